"""The policy's weights under the names of its base model: adapters folded in, quantised matrices dequantised."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.models.lora import adapter_layers
from rlhfctl.models.quantize import dense_linear, is_quantized, put


@torch.no_grad()
def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), shared ones once: W, or W + (alpha / rank) B A summed in float32 and rounded once to W's dtype.

    One merged matrix exists at a time. The trained weights are not touched.
    """
    adapted = {id(layer) for layer in adapter_layers(policy)}
    made = {
        name: module
        for name, module in policy.named_modules()
        if id(module) in adapted or (is_quantized(module) and not name.endswith(".base_layer"))
    }
    yielded = set()
    for name, parameter in policy.named_parameters():
        owner = next((layer for layer in made if name.startswith(f"{layer}.")), None)
        if owner is None:
            yield name, parameter.detach()
        elif owner not in yielded:
            yielded.add(owner)
            for kind, merged in merged_linear(made[owner]).named_parameters():
                yield f"{owner}.{kind}", merged.detach()


def merged_linear(layer: Any) -> nn.Linear:
    """An ordinary layer that computes what an adapted or quantised one does."""
    if is_quantized(layer):
        return dense_linear(layer)
    deltas = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]
    return dense_linear(layer.get_base_layer(), sum(deltas[1:], deltas[0]) if deltas else None)


def make_dense(model: nn.Module) -> None:
    """Adapters folded in and every quantised layer an ordinary one again; in place."""
    adapted = {id(layer) for layer in adapter_layers(model)}
    for wrapped in (lambda module: id(module) in adapted, is_quantized):
        for name, module in [found for found in model.named_modules() if wrapped(found[1])]:
            put(model, name, merged_linear(module))
