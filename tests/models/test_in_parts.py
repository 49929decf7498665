"""Buckets of parameters, and weights that reach an engine by them."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.models.in_parts import buckets, gathered, in_parts, shape_of
from rlhfctl.models.lora import add_lora
from rlhfctl.models.merged import exhaust, merged_weights
from rlhfctl.recipe.sections import Lora

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


def test_a_bucket_is_full_or_one_parameter() -> None:
    sizes = [5, 5, 1, 30, 2, 2]
    found = list(buckets([nn.Parameter(torch.zeros(size)) for size in sizes], 10))
    assert [[each.numel() for each in bucket] for bucket in found] == [[5, 5], [1], [30], [2, 2]]


@pytest.mark.parametrize("adapted", [False, True])
def test_small_buckets_bring_the_same_weights(adapted: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    if adapted:
        add_lora(model, Lora(rank=2, alpha=4.0, target_modules=["q_proj", "down_proj"]), 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    whole = dict(merged_weights(model))
    parts = list(merged_weights(model, elements=20))
    assert [name for name, _ in parts] == list(whole)
    assert all(bool((tensor == whole[name]).all()) for name, tensor in parts)
    assert "lm_head.weight" not in whole  # tied: once


def test_what_is_whole_is_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    assert not in_parts(parameter)
    assert shape_of(parameter) == (3,)
    with gathered([parameter]):
        assert parameter.tolist() == [1, 1, 1]
    taken = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    next(taken)
    exhaust(taken)
    assert next(taken, None) is None
