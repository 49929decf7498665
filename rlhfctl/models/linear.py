"""float32 matrix products on CPU through oneDNN where that is the faster library.

torch sends float32 products to MKL, which works on 256 bits at a time on AMD processors. Zen 5 (family 26) multiplies
512: with 1,024 rows and one thread MKL reached 108 and oneDNN 240 GFLOP/s. Zen 4 takes 512 bits in two halves: both
reach 90 there, and oneDNN costs copies of transposed gradients, filled-up packs and memory. The few rows of a rollout,
by matrices laid out once in oneDNN's own order (rollout/decode.py), are its own on both: 62 against 41 GFLOP/s at 32
rows of Zen 4. On Intel's processors they are MKL's, by matrices laid out once in its order: 54 against 25 GFLOP/s at 8
rows, 59 against 46 at 32, 89 against 74 at 128 of a Xeon with AMX. bfloat16 goes to oneDNN everywhere. Same precision,
another order of summation. The choice depends on the processor alone, never on a timing, so that a machine gives the
same numbers every time. RLHFCTL_MATMUL=torch, onednn or packed (torch, and MKL's order for the few rows) overrides it.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.processor import amd_family, matmul_choice, packs_few_rows

WIDE = 26  # the first family of AMD processors whose float32 units are 512 bits wide


def onednn_wanted(family: int) -> bool:
    """Whether RLHFCTL_MATMUL asks for oneDNN; left alone, whether AMD made the processor, of that family or later.

    Raises UsageError.
    """
    choice = matmul_choice()
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if choice != "auto":
        return choice == "onednn"
    made = amd_family()
    return made is not None and made >= family and torch.backends.mkl.is_available()


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """For products of many rows, and their gradients."""
    return onednn_wanted(WIDE)


def onednn_decodes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a rollout's few rows are multiplied by matrices in oneDNN's own order of memory."""
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return onednn_wanted(0)


def mkl_packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a rollout's few rows are multiplied by matrices in MKL's own order of memory."""
    if device.type != "cpu" or dtype != torch.float32 or not hasattr(torch.ops.mkl, "_mkl_linear"):
        return False
    return packs_few_rows()


@lru_cache(maxsize=1)
def multiplies_tiles() -> bool:
    """Whether the processor has units that multiply bfloat16 tiles (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def shape_bucket(dtype: torch.dtype, device: torch.device) -> int:
    """Tokens to which packs, and rows of the head, are filled up: oneDNN keeps code and buffers for every shape it has
    met, some 7 MB a length, which costs hundreds of MB when every pack has its own. Filling up costs time: a float32
    product of 557 rows takes as long as its rows, one of 640 a sixth longer; of bfloat16 products it does not show."""
    if device.type != "cpu":
        return 1
    if dtype == torch.bfloat16:
        return 128
    return 64 if onednn_is_faster() else 1


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] x b [m, k] -> a @ b.T [n, m]; without gradient."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and len(a) and onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.t()


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into [n, m] += a [n, k] x b [m, k]; without gradient."""
    one_kernel = into.dtype == a.dtype == b.dtype and not (into.dtype == torch.float32 and onednn_is_faster())
    if one_kernel:
        into.addmm_(a, b.t())
    else:
        into += product(a, b)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _pointwise(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = product(grads, weight.t()).view_as(x) if needs_x else None
        grad_weight = product(grads.t(), rows.t()) if needs_weight else None
        return grad_x, grad_weight, grads.sum(0) if needs_bias else None


class OnednnLinear(nn.Linear):
    """nn.Linear, the product through oneDNN in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() == 0:
            return super().forward(x)
        if not torch.is_grad_enabled():  # a small product costs less than autograd's function around it
            return _pointwise(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


def speed_up(model: nn.Module) -> None:
    """Let the model's linear layers use the faster library (in place; parameters and names stay)."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OnednnLinear
