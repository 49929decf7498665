"""Low-rank adapters through peft: train few weights, get the reference policy for free by switching them off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlhfctl.recipe.sections import Lora


def add_lora(model: nn.Module, lora: Lora, seed: int) -> None:
    """Put adapters into the model; only they require gradients. B starts at zero: the model is unchanged."""
    import torch
    from peft import LoraConfig

    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    model.add_adapter(config)  # type: ignore[operator]


def adapter_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside: the frozen base model."""
    layers = adapter_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
