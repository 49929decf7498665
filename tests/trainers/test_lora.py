"""Adapters: nothing changes when they are added, off means the base model, merged means the adapted one."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.models import attention
from rlhfctl.models.export import export_policy, load_trainable
from rlhfctl.models.head import token_logprobs
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors, prepare
from rlhfctl.models.lora import adapters_off, add_lora
from rlhfctl.models.packing import pack
from rlhfctl.quickstart import chains
from rlhfctl.recipe.sections import Lora, Policy

CONFIG = LlamaConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LORA = Lora(rank=4, alpha=8)


def fresh():
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation=attention.NAME)
    return prepare(model, torch.device("cpu"))


def logprobs(model):
    batch = pack([0, 1], [[3, 9, 4, 7, 2], [5, 8, 1]], [range(1, 5), range(1, 3)])
    hidden = hidden_at_predictors(backbone(model), batch)
    return token_logprobs(hidden, head_weight(model), batch.targets)[0]


@pytest.fixture
def adapted():
    """A model whose adapters are away from zero."""
    model = fresh()
    add_lora(model, LORA, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_fresh_adapters_change_nothing_and_are_all_that_trains():
    model = fresh()
    before = logprobs(model).detach()
    add_lora(model, LORA, seed=1)
    torch.testing.assert_close(logprobs(model).detach(), before, atol=1e-6, rtol=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    logprobs(model).sum().backward()
    assert all(p.grad is None for _, p in model.named_parameters() if not p.requires_grad)


def test_adapters_off_is_the_base_model(adapted):
    base, on = logprobs(fresh()).detach(), logprobs(adapted).detach()
    assert float((on - base).abs().max()) > 1e-2
    with adapters_off(adapted):
        torch.testing.assert_close(logprobs(adapted).detach(), base, atol=1e-6, rtol=0)
    assert torch.equal(logprobs(adapted).detach(), on)


def test_merged_export_equals_the_adapted_model_and_leaves_it_alone(adapted, tmp_path):
    chains.main([str(tmp_path), "--seed", "0"])
    policy = Policy(path=str(tmp_path / "model"), lora=LORA)
    expected = logprobs(adapted).detach()
    export_policy(adapted, policy, tmp_path / "out", merge=True)
    assert torch.equal(logprobs(adapted).detach(), expected)
    assert not (tmp_path / "out/adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=attention.NAME)
    torch.testing.assert_close(logprobs(loaded.eval()).detach(), expected, atol=1e-5, rtol=0)


def test_a_saved_adapter_comes_back_exactly(adapted, tmp_path):
    chains.main([str(tmp_path), "--seed", "0"])
    policy = Policy(path=str(tmp_path / "model"), lora=LORA)
    export_policy(adapted, policy, tmp_path / "adapter", merge=False)
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again = fresh()
    add_lora(again, LORA, seed=99)
    load_trainable(again, tmp_path / "adapter")
    for (name, mine), (_, theirs) in zip(again.named_parameters(), adapted.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
