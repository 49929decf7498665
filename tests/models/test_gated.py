"""The written-out gated unit against transformers' module: the same forward, bit for bit, and its gradients."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from rlhfctl.models.gated import GatedUnit, write_out_units

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}


def units(kind, config, **keys):
    """Before and after, of the same weights."""
    torch.manual_seed(1)
    plain = torch.nn.Sequential(kind(config(**SIZES, **keys)))
    ours = torch.nn.Sequential(kind(config(**SIZES, **keys)))
    ours.load_state_dict(plain.state_dict())
    write_out_units(ours)
    return plain, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config"), [(LlamaMLP, LlamaConfig), (Qwen2MLP, Qwen2Config)])
def test_values_bit_for_bit_and_gradients(kind, config, dtype):
    plain, ours = units(kind, config)
    assert type(ours[0]) is GatedUnit
    x, on = torch.randn(2, 1, 9, 12, generator=torch.Generator().manual_seed(2)).to(dtype).unbind(0)
    found = []
    for model in (plain.to(dtype), ours.to(dtype)):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (y * on).sum().backward()
        found.append([y.detach(), leaf.grad, *(parameter.grad for parameter in model.parameters())])
    for theirs, mine in zip(*found, strict=True):
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize(
    ("biased", "count"),
    [
        (False, 2),  # gate and up
        (True, 3),  # a last layer that is more than one matrix keeps what it reads
    ],
)
def test_what_it_keeps_of_the_inner_size(biased, count):
    _, ours = units(LlamaMLP, LlamaConfig, mlp_bias=biased)
    kept = {}

    def keep(x):
        if not isinstance(x, torch.nn.Parameter) and x.shape[-1] == SIZES["intermediate_size"]:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ours(torch.randn(1, 9, 12))
    assert list(kept.values()) == count * [9 * 20 * 4]


def test_a_frozen_last_matrix_gets_no_gradient():
    plain, ours = units(LlamaMLP, LlamaConfig)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
    for model in (plain, ours):
        model[0].down_proj.weight.requires_grad_(False)
        model(x).square().sum().backward()
    assert ours[0].down_proj.weight.grad is None
    for theirs, mine in zip(plain[0].parameters(), ours[0].parameters(), strict=True):
        assert mine.grad is None if theirs.grad is None else torch.equal(mine.grad, theirs.grad)


def test_a_hook_on_the_last_matrix_is_called():
    _, ours = units(LlamaMLP, LlamaConfig)
    seen = []
    ours[0].down_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    ours(torch.randn(2, 12))
    assert seen == [(2, 12)]


def test_other_activations_stay_as_they_are():
    plain, ours = units(LlamaMLP, LlamaConfig, hidden_act="gelu")
    assert type(ours[0]) is LlamaMLP
    x = torch.randn(2, 12)
    assert torch.equal(plain(x), ours(x))
