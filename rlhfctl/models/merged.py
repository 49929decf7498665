"""The policy's weights under the names of its base model: adapters folded in, quantised matrices dequantised."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused, RunFailed
from rlhfctl.models.finite import all_finite
from rlhfctl.models.in_parts import BUCKET, buckets, gathered
from rlhfctl.models.lora import adapter_layers
from rlhfctl.models.quantize import dense_linear, is_quantized, put


@torch.no_grad()
def merged_weights(policy: nn.Module, elements: int = BUCKET) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), shared ones once: W, or W + (alpha / rank) B A summed in float32 and rounded once to W's dtype.

    One merged matrix exists at a time. The trained weights are not touched. Of parameters in parts (ZeRO-3) one bucket
    of at most `elements` is whole at a time: then every rank takes every tensor, for each bucket is a collective.
    """
    adapted = {id(layer) for layer in adapter_layers(policy)}
    made = {
        name: module
        for name, module in policy.named_modules()
        if id(module) in adapted or (is_quantized(module) and not name.endswith(".base_layer"))
    }
    owners = {id(parameter): name for name, module in made.items() for parameter in module.parameters()}
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    yielded = set()
    # The parameters of a merged layer lie side by side; they are gathered together even across the end of a bucket.
    for bucket in buckets(policy.parameters(), elements):
        with gathered(together(bucket, owners, made)):
            for parameter in bucket:
                owner = owners.get(id(parameter))
                if owner is None:
                    yield names[id(parameter)], parameter.detach()
                elif owner not in yielded:
                    yielded.add(owner)
                    for kind, merged in merged_linear(made[owner]).named_parameters():
                        yield f"{owner}.{kind}", merged.detach()


def exhaust(weights: Iterator[tuple[str, Tensor]]) -> None:
    """Take what is left of merged_weights: the other ranks wait for this one's share in every bucket."""
    for _ in weights:
        continue


def together(
    bucket: list[nn.Parameter], owners: dict[int, str], made: dict[str, nn.Module]
) -> list[nn.Parameter]:
    """The bucket, and what else its merged layers are made of."""
    layers = {owners[id(parameter)] for parameter in bucket if id(parameter) in owners}
    more = [parameter for name in sorted(layers) for parameter in made[name].parameters()]
    return list({id(parameter): parameter for parameter in [*bucket, *more]}.values())


def merged_linear(layer: Any) -> nn.Linear:
    """An ordinary layer that computes what an adapted or quantised one does."""
    if is_quantized(layer):
        return dense_linear(layer)
    refuse_unfoldable(layer)
    deltas = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]
    return dense_linear(layer.get_base_layer(), sum(deltas[1:], deltas[0]) if deltas else None)


def refuse_unfoldable(layer: Any) -> None:
    """Adapters that are more than W + (alpha / rank) B A: what they add would be lost."""
    kinds = {
        "a DoRA adapter": any(layer.use_dora.get(name) for name in layer.active_adapters),
        "an adapter with a bias": any(layer.lora_bias.get(name) for name in layer.active_adapters),
        "an adapter on an embedding": isinstance(layer.get_base_layer(), nn.Embedding),
    }
    for kind, holds in kinds.items():
        if holds:
            raise Refused(
                f"{kind} cannot be folded into the weights here: use it without an engine of its own, or merge it "
                "into its base with peft first"
            )


def make_dense(model: nn.Module) -> None:
    """Adapters folded in and every quantised layer an ordinary one again; in place. Raises RunFailed."""
    adapted = {id(layer) for layer in adapter_layers(model)}
    for wrapped in (lambda module: id(module) in adapted, is_quantized):
        for name, module in [found for found in model.named_modules() if wrapped(found[1])]:
            merged = merged_linear(module)
            if not all_finite(list(merged.parameters())):
                raise RunFailed(
                    f"the adapter of {name} overflows when it is added to its weight: the merged model would hold NaN "
                    "or infinity and is not saved; lower optim.lr"
                )
            put(model, name, merged)
