"""The gated unit of the Llama family, y = silu(g) * u and what follows, z = y W^T, without keeping silu(g) or y.

    dy = dz W,   dW = dz^T y,   dg = dy * u * silu'(g),   du = dy * silu(g)

g and u are kept, silu(g) and y are computed again: of four tensors [T, I] a layer two less, for one pass over [T, I].
Where the last matrix is more than one (LoRA, quantised, ZeRO-3), y is kept as its input. Forward is transformers' own,
operation for operation. On a CPU; otherwise the module computes what it did.

T rows (all leading dimensions), I inner size, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhfctl.models.linear import OnednnLinear, product

UNITS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, functional.silu(gate).mul_(grad)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        inner = functional.silu(gate).mul_(up)
        return product(inner.flatten(0, -2), weight).view(*inner.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        rows, activated = grad.flatten(0, -2), functional.silu(gate)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = product(rows.t(), (activated * up).flatten(0, -2).t())
        grad_inner = product(rows, weight.t()).view_as(gate)
        grad_gate = torch.ops.aten.silu_backward(grad_inner * up, gate)
        return grad_gate, activated.mul_(grad_inner), grad_weight


def one_matrix(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is x W^T and nothing else, of one matrix that lies here whole."""
    if type(layer) not in (nn.Linear, OnednnLinear) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    matrix: Any = layer
    return matrix.bias is None and matrix.weight.dtype == x.dtype and not hasattr(matrix.weight, "ds_id")


class GatedUnit(nn.Module):
    """What a unit of UNITS with silu becomes: its matrices stay, whatever they are."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if x.device.type == "cpu":
            if one_matrix(self.down_proj, x):
                made: Tensor = _GatedProduct.apply(gate, up, self.down_proj.weight)
                return made
            inner: Tensor = _Gated.apply(gate, up)
        else:
            inner = functional.silu(gate) * up
        out: Tensor = self.down_proj(inner)
        return out


def write_out_units(model: nn.Module) -> None:
    """Let the model's gated units do so (in place; parameters and names stay)."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in UNITS and kind.__module__.startswith("transformers.models."):
            activation: Any = getattr(module, "act_fn", None)
            if isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
                module.__class__ = GatedUnit
