"""Linear layers whose frozen weights are kept in 8 or 4 bits by bitsandbytes (`pip install 'rlhfctl[quant]'`).

bitsandbytes quantises, stores and dequantises; the product is made here, of x in its own dtype and the dequantised
weight, in the forward and in the backward pass:

    y = x W^T + b,   dL/dx = dL/dy W,   W = dequantise(q) for the time of the product

so that a layer is one function of its input: rollouts, training and the reference see the same weights, whatever else
is in the batch, and merging an adapter means W + delta. bitsandbytes's own products differ between eval and train
(int8 rounds the activations too, and decomposes outliers of the whole batch), and repack 4-bit weights for good in a
forward pass without gradient on processors with AVX512_BF16.

int8       LLM.int8() (arXiv 2208.07339) row by row: q = round(127 w / max |w| of the row), one byte a weight
nf4, fp4   QLoRA (arXiv 2305.14314), blocks of a row: 4 bits a weight and one float32 scale a block
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.models.linear import product

# Its import warns of kernels for products that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes as bnb  # noqa: E402


class _Product(torch.autograd.Function):
    """The dense weight is not kept for the backward pass: it is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Int8Linear | FourBitLinear") -> Tensor:
        ctx.layer = layer
        weight = layer.dense_weight().to(x.dtype)
        out = product(x.reshape(-1, x.shape[-1]), weight)
        if layer.bias is not None:
            out = out + layer.bias.to(x.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        weight = ctx.layer.dense_weight().to(grad.dtype)
        rows = product(grad.reshape(-1, grad.shape[-1]), weight.t())
        return rows.view(*grad.shape[:-1], weight.shape[1]), None


class Int8Linear(bnb.nn.Linear8bitLt):
    """weight: int8 [out, in]; its SCB: the largest magnitude of each row, float32 [out]."""

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            has_fp16_weights=False,
            device="meta",
        )
        self.dense_dtype = layer.weight.dtype
        self.bits = 8
        rows, scale, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.to(device, torch.float16))
        self.weight: Any = bnb.nn.Int8Params(
            rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scale
        )
        self.bias: Any = frozen_bias(layer, device)

    def dense_weight(self) -> Tensor:
        """[out, in] in the dtype that the weight had."""
        return bnb.functional.int8_vectorwise_dequant(self.weight.data, self.weight.SCB).to(self.dense_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class FourBitLinear(bnb.nn.Linear4bit):
    """weight: two 4-bit codes a byte [out * in / 2, 1]; its quant_state: the scale of each block of a row."""

    def __init__(self, layer: nn.Linear, kind: str, block: int, device: torch.device) -> None:
        super().__init__(
            layer.in_features, layer.out_features, layer.bias is not None, quant_type=kind, device="meta"
        )
        codes, state = bnb.functional.quantize_4bit(
            layer.weight.data.to(device).contiguous(), blocksize=block, quant_type=kind
        )
        self.weight: Any = bnb.nn.Params4bit(
            codes, requires_grad=False, quant_state=state, blocksize=block, compress_statistics=False,
            quant_type=kind, bnb_quantized=True,
        )  # fmt: skip
        self.quant_state = state
        self.bits = 4
        self.bias: Any = frozen_bias(layer, device)

    def dense_weight(self) -> Tensor:
        """[out, in] in the dtype that the weight had."""
        return bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


def frozen_bias(layer: nn.Linear, device: torch.device) -> nn.Parameter | None:
    return None if layer.bias is None else nn.Parameter(layer.bias.data.to(device), requires_grad=False)
