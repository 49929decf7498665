"""Attention with the rotation written out against transformers' modules: values, gradients, windows, what it leaves."""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from rlhfctl.models import attention
from rlhfctl.models.attention import PackedLayout
from rlhfctl.models.rotary import RotaryAttention, rotated, write_out_rotation

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = [
    (LlamaModel, LlamaConfig, {"sliding_window": 3}, None),  # a key that Llama does not have
    (MistralModel, MistralConfig, {"sliding_window": 3}, 3),
    (MistralModel, MistralConfig, {"sliding_window": None}, None),
    (Qwen2Model, Qwen2Config, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}, 3),
    (Qwen3Model, Qwen3Config, {}, None),
]
LENGTHS = [7, 5]


def models(kind, config, keys, dtype=torch.float32):
    """Before and after, of the same weights."""
    attention.register()
    torch.manual_seed(1)
    plain = kind(config(**SIZES, **keys, attn_implementation=attention.NAME)).to(dtype).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(plain)
    write_out_rotation(ours)
    return plain, ours


def forward(model):
    positions = torch.tensor([[place for length in LENGTHS for place in range(length)]])
    ids = (positions * 7 + 3) % 40
    layout = PackedLayout.of_lengths(LENGTHS)
    return model(input_ids=ids, position_ids=positions, use_cache=False, layout=layout).last_hidden_state


@pytest.mark.parametrize(("kind", "config", "keys", "seen"), FAMILIES)
def test_values_gradients_and_windows_of_the_module(kind, config, keys, seen):
    plain, ours = models(kind, config, keys)
    assert all(isinstance(layer.self_attn, RotaryAttention) for layer in ours.layers)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in ours.named_parameters()]
    windows = []
    inner = PackedLayout.attend

    def attend(self, layer, query, key, value, scale, window):
        windows.append(window)
        return inner(self, layer, query, key, value, scale, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLayout, "attend", attend)
        found = [forward(model) for model in (plain, ours)]
    assert windows == 4 * [seen]
    torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=1e-5)
    on = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(2))
    for out in found:
        (out * on).sum().backward()
    for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-5, rtol=1e-4)


def test_a_rotation_and_its_gradient_against_the_formula():
    """Halves with cosines and sines of their own: nothing rests on both being equal."""
    generator = torch.Generator().manual_seed(3)
    x, on = (torch.randn(1, 5, 3, 8, generator=generator) for _ in range(2))
    cos, sin = (torch.randn(1, 5, 8, generator=generator) for _ in range(2))
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    turned = torch.cat([-exact[..., 4:], exact[..., :4]], dim=-1)
    expected = exact * cos[:, :, None] + turned * sin[:, :, None]
    found = rotated(mine, cos, sin)
    (expected * on).sum().backward()
    (found * on).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine.grad.double(), exact.grad, atol=1e-6, rtol=1e-6)


def test_bfloat16_errs_no_more_than_the_module_but_for_a_tenth():
    plain, ours = models(*FAMILIES[0][:3])
    exact = forward(plain)
    theirs, mine = ((forward(model.bfloat16()).float() - exact).square().mean() for model in (plain, ours))
    assert mine <= 1.1 * theirs


def test_a_cache_goes_through_the_module():
    _, ours = models(LlamaModel, LlamaConfig, {})
    ours.set_attn_implementation("sdpa")
    ids = torch.arange(6)[None]
    whole = ours(input_ids=ids, use_cache=False).last_hidden_state
    cache = DynamicCache(config=ours.config)
    parts = [
        ours(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
        for part in (ids[:, :4], ids[:, 4:])
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_cache_is_filled_whatever_the_attention():
    _, ours = models(LlamaModel, LlamaConfig, {})
    cache = DynamicCache(config=ours.config)
    ids = torch.arange(6)[None]
    ours(input_ids=ids, past_key_values=cache, use_cache=True, layout=PackedLayout.of_lengths([6]))
    assert cache.get_seq_length() == 6
