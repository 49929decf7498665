"""The written-out RMSNorm against transformers' module: the same forward, bit for bit, and its gradients."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from rlhfctl.models.norm import RmsNorm, write_out_norms


def norms(kind, dtype=torch.float32):
    """Before and after, of the same weights."""
    plain, ours = torch.nn.Sequential(kind(24, 1e-2)), torch.nn.Sequential(kind(24, 1e-2))
    weight = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5
    for module in (plain, ours):
        module[0].weight.data = weight.to(dtype)
    write_out_norms(ours)
    assert type(ours[0]) is RmsNorm
    return plain, ours


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
def test_values_bit_for_bit_and_gradients(kind):
    plain, ours = norms(kind)
    x, on = torch.randn(2, 2, 7, 24, generator=torch.Generator().manual_seed(2)).unbind(0)
    x = (
        x * torch.tensor([0.1, 3.0])[:, None, None]
    )  # rows where eps is most of the mean, and where it is nothing
    found = []
    for module, exact in ((ours, False), (plain, False), (plain, True)):
        module = module.double() if exact else module
        leaf = (x.double() if exact else x.clone()).requires_grad_()
        # The module itself computes in float32: exact from its formula.
        y = (
            module[0].weight * leaf * (leaf.square().mean(-1, keepdim=True) + 1e-2).rsqrt()
            if exact
            else module(leaf)
        )
        module.zero_grad()
        (y * on).sum().backward()
        found.append((y.detach(), leaf.grad, module[0].weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0])
    for ours_grad, exact_grad in zip(found[0][1:], found[2][1:], strict=True):
        torch.testing.assert_close(ours_grad.double(), exact_grad, atol=1e-6, rtol=1e-5)


def test_frozen_parts_and_bfloat16():
    plain, ours = norms(LlamaRMSNorm)
    x = torch.randn(3, 24)
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    assert ours[0].weight.grad is None
    plain, ours = norms(LlamaRMSNorm, torch.bfloat16)
    assert torch.equal(ours(x.bfloat16()), plain(x.bfloat16()))


def test_gradients_of_bfloat16_rows_are_no_further_off_than_autograd_s():
    plain, ours = norms(LlamaRMSNorm, torch.bfloat16)
    x, on = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(3)).bfloat16().unbind(0)
    found = []
    for module in (ours, plain):
        leaf = x.clone().requires_grad_()
        (module(leaf) * on).sum().backward()
        found.append((leaf.grad.double(), module[0].weight.grad.double()))
    leaf, weight = x.double().requires_grad_(), plain[0].weight.detach().double().requires_grad_()
    (weight * leaf * (leaf.square().mean(-1, keepdim=True) + 1e-2).rsqrt() * on.double()).sum().backward()
    for mine, theirs, exact in zip(*found, (leaf.grad, weight.grad), strict=True):
        assert (mine - exact).norm() <= 1.05 * (theirs - exact).norm()
        assert (mine - exact).norm() <= 0.01 * exact.norm()
