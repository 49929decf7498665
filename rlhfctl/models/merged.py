"""The policy's weights under the names of its base model, adapters folded in, the trained weights untouched."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlhfctl.models.lora import adapter_layers


@torch.no_grad()
def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), shared ones once: W, or W + (alpha / rank) B A summed in float32 and rounded once to W's dtype.

    One merged matrix exists at a time.
    """
    layers = {id(layer): layer for layer in adapter_layers(policy)}
    names = {name: layers[id(module)] for name, module in policy.named_modules() if id(module) in layers}
    for name, parameter in policy.named_parameters():
        owner = next((layer for layer in names if name.startswith(f"{layer}.")), None)
        if owner is None:
            yield name, parameter.detach()
        elif name.startswith(f"{owner}.base_layer."):
            kind = name.removeprefix(f"{owner}.base_layer.")
            weight = parameter.detach()
            if kind == "weight":
                for adapter in names[owner].active_adapters:
                    delta = names[owner].get_delta_weight(adapter).float()
                    weight = (weight.float() + delta).to(parameter.dtype)
            yield f"{owner}.{kind}", weight
