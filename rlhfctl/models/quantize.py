"""QLoRA: the backbone's matrices in 8 or 4 bits, frozen; embeddings, norms and heads stay as they are."""

from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused, Unable
from rlhfctl.install import install_line


def quantize(trunk: nn.Module, kind: str, block: int, device: torch.device) -> None:
    """Replace the linear layers of a backbone by quantised ones on `device`, one at a time; in place.

    kind: int8 | nf4 | fp4; block: weights that share a scale (4 bits).
    Raises Unable without bitsandbytes, Refused where a row is not a whole number of blocks: bitsandbytes would then
    read the weights back with the wrong scales (on a CPU at least, and without a word).
    """
    try:
        from rlhfctl.models.quantized_linear import FourBitLinear, Int8Linear
    except ModuleNotFoundError as error:
        raise Unable(f"policy.quantization {kind} needs {error.name}: {install_line('quant')}") from error
    layers = [(name, module) for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    uneven = [name for name, layer in layers if kind != "int8" and layer.in_features % block]
    if uneven:
        raise Refused(
            f"policy.quantization_block {block} does not divide the {trunk.get_submodule(uneven[0]).in_features} "
            f"columns of {uneven[0]} ({len(uneven)} layers): use a smaller block, or int8"
        )
    for name, layer in layers:
        put(
            trunk,
            name,
            Int8Linear(layer, device) if kind == "int8" else FourBitLinear(layer, kind, block, device),
        )


def dense_weight(layer: nn.Module) -> Tensor:
    """The matrix [out, in] of a linear layer, dequantised where it is not kept as such."""
    found = getattr(layer, "dense_weight", None)
    if found is not None:
        return found()
    weight: Any = layer.weight
    return weight.detach()


def is_quantized(layer: nn.Module) -> bool:
    return hasattr(layer, "dense_weight")


def dense_linear(layer: nn.Module, delta: Tensor | None = None) -> nn.Linear:
    """An ordinary layer with W + delta, summed in float32 and rounded once to W's dtype."""
    weight = dense_weight(layer)
    if delta is not None:
        weight = (weight.float() + delta.float()).to(weight.dtype)
    bias: Any = layer.bias
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    dense.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return dense


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
