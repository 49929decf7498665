"""The gated unit of the Llama family, silu(g) * u, without keeping silu(g) for the backward pass.

    dg = dy * u * silu'(g),   du = dy * silu(g)

g and u are kept, silu(g) is computed again: of four tensors [T, I] a layer one less. Forward is transformers' own,
operation for operation. On a CPU; otherwise the module computes what it did.

T rows (all leading dimensions), I inner size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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


class GatedUnit(nn.Module):
    """What a unit of UNITS with silu becomes: its matrices stay, whatever they are."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if x.device.type == "cpu":
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
