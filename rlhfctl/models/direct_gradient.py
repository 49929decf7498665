"""Gradients added straight into `parameter.grad`, where a backward pass would first make one of the whole matrix.

An embedding of 151,936 rows has a gradient of 155 MB at 256 hidden units: autograd makes one for the lookup, one for
the head, and adds the two. Here each adds its rows to the one that is there. Only for parameters whose owner allowed
it: it reads `grad` at the optimizer step and has no hooks on the way (not DeepSpeed).
"""

from typing import Any

import torch
from torch import Tensor, nn


def allow(parameter: nn.Parameter) -> None:
    parameter.direct_gradient = True  # type: ignore[attr-defined]


def allowed(parameter: Tensor) -> bool:
    return getattr(parameter, "direct_gradient", False) and parameter.device.type == "cpu"


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient that is there to be added to: zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ids, weight = ctx.saved_tensors
        # Summed for each token first: in bfloat16 many small addends on one row would round away.
        tokens, place = ids.flatten().unique(return_inverse=True)
        sums = torch.zeros(len(tokens), weight.shape[1], dtype=torch.float32)
        sums.index_add_(0, place, grad.flatten(0, -2).float())
        gradient_of(weight).index_add_(0, tokens, sums.to(weight.dtype))
        return None, None


class DirectEmbedding(nn.Embedding):
    """nn.Embedding without padding_idx, the gradient of its rows added straight to what is there."""

    def forward(self, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad and allowed(self.weight):
            return _Lookup.apply(ids, self.weight)
        return super().forward(ids)


def look_up_directly(model: nn.Module) -> None:
    """Let the model's embeddings do so (in place; parameters and names stay)."""
    for module in model.modules():
        if type(module) is nn.Embedding and module.padding_idx is None and module.max_norm is None:
            module.__class__ = DirectEmbedding
