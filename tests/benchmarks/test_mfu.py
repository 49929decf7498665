"""Where a step's time goes: operations by kind, and the bare products of a model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.mfu import by_kind, roof

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def test_operations_by_kind() -> None:
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    with torch.profiler.profile() as profile:
        for _ in range(20):
            torch.mm(a, b)
        torch.exp(a)
    shares = by_kind(profile)
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["matrix products"] > shares["elementwise, reductions"] > 0
    assert shares["attention"] == shares["optimizer"] == 0


def test_the_roof_has_every_product_of_the_model() -> None:
    """Seven matrices a layer in four shapes, and the head at the trained share of the tokens."""
    total, table = roof(AutoModelForCausalLM.from_config(CONFIG), 0.5)
    assert total > 0
    assert [(line["rows"], line["in"], line["out"], line["layers"]) for line in table] == [
        (1024, 64, 64, 4),
        (1024, 64, 32, 4),
        (1024, 64, 96, 4),
        (1024, 96, 64, 2),
        (512, 64, 256, 1),
    ]
