"""RMSNorm of the Llama family with its gradient written out: five passes over the rows where autograd makes twelve.

    h = x / sqrt(mean(x^2) + eps),   y = w * h
    dw = sum over rows of dy * h,    dx = (w * dy - h * mean(w * dy * h)) / sqrt(mean(x^2) + eps)

T rows (all leading dimensions), H hidden. Forward is transformers' own, operation for operation; of bfloat16 rows h is
kept as it was rounded, and the gradient computed in float32. On a CPU; otherwise the module computes what it did.
"""

from typing import Any

import torch
from torch import Tensor, nn

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.float()
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        normed = (exact * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        exact, w = normed.float(), weight.float()
        both = (grad * exact).flatten(0, -2)
        grad_weight = both.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        mean = (both @ w).view(scale.shape) / len(weight)
        return (grad * w).addcmul_(exact, mean, value=-1).mul_(scale).to(grad.dtype), grad_weight, None


class RmsNorm(nn.Module):
    """What a norm of NORMS becomes: `weight` and `variance_epsilon` stay."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.device.type == "cpu":
            return _RmsNorm.apply(x, self.weight, self.variance_epsilon)
        exact = x.to(torch.float32)
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * exact.to(x.dtype)


def write_out_norms(model: nn.Module) -> None:
    """Let the model's norms do so (in place; parameters and names stay)."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in NORMS and kind.__module__.startswith("transformers.models."):
            module.__class__ = RmsNorm
