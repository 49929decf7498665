"""Low-rank adapters through peft: train few weights, get the reference policy for free by switching them off.

One backbone may carry several: the policy's, and a value model's beside it. Exactly one of them, or none, acts at a
time. Switching touches neither weights nor what requires a gradient, so it is allowed between a forward and its
backward pass (gradient checkpointing runs the forward again: its backward pass belongs inside the switch).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlhfctl.recipe.sections import Lora

POLICY = "default"  # peft's own name of a single adapter, which the files of others hold
VALUE = "value"


def add_lora(model: nn.Module, lora: Lora, seed: int, name: str = POLICY) -> None:
    """Put adapters into the model; only adapters require gradients. B starts at zero: the model is unchanged.

    The one added last acts.
    """
    import torch
    from peft import LoraConfig

    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets(model, lora),
        task_type="CAUSAL_LM",
    )
    announce_quantized(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two on one backbone are meant
        model.add_adapter(config, name)  # type: ignore[operator]
    switch(model, [name])


def targets(model: nn.Module, lora: Lora) -> str | list[str]:
    """peft's `all-linear` takes an adapter's own matrices for the model's where there is one already."""
    layers = {id(layer) for layer in adapter_layers(model)}
    if lora.target_modules != "all-linear" or not layers:
        return lora.target_modules
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in layers})


def announce_quantized(model: nn.Module) -> None:
    """How peft learns which adapter layer fits a quantised one."""
    bits = {getattr(module, "bits", None) for module in model.modules()}
    for width, flag in ((8, "is_loaded_in_8bit"), (4, "is_loaded_in_4bit")):
        if width in bits:
            setattr(model, flag, True)


def adapter_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def switch(model: nn.Module, names: list[str]) -> None:
    """These adapters act from here on. peft's own set_adapter would also freeze the others."""
    for layer in adapter_layers(model):
        layer._active_adapter = names
        for kind in (layer.lora_A, layer.lora_B):
            kind.requires_grad_(True)


@contextmanager
def acting(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside: these adapters act, and no others."""
    layers = adapter_layers(model)
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = names
    try:
        yield
    finally:
        for layer, names_before in zip(layers, before, strict=True):
            layer._active_adapter = names_before


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside: the frozen base model."""
    with acting(model, []):
        yield


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter under their names in the model."""
    return {
        place: parameter
        for place, parameter in model.named_parameters()
        if f".lora_A.{name}." in place or f".lora_B.{name}." in place
    }


def own_parameters(policy: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The policy's parameters without those of a value model's adapter on its backbone."""
    others = adapter_parameters(policy, VALUE)
    return [(name, parameter) for name, parameter in policy.named_parameters() if name not in others]
