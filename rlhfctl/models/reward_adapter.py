"""A reward model as a LoRA adapter with its head: read from, and written in, the layout that peft reads."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfctl.models.adapter_weights import put_adapter, read_adapter
from rlhfctl.models.lora import announce_quantized
from rlhfctl.models.value_head import ADAPTER_PREFIX, head_names

NAME = "default"  # peft's name of the one adapter
KINDS = ("weight", "bias")  # of a head


def load_adapter(trunk: nn.Module, directory: Path) -> None:
    """Put the adapter's weights, without its head, into a bare backbone. Raises Refused where one finds no place."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig.from_pretrained(str(directory))
    # They replace parts of the backbone (models/adapter_weights.py); the head is ours.
    config.modules_to_save = config.trainable_token_indices = None
    config.task_type = None
    heads = {f"{name.removesuffix('weight')}{kind}" for name in head_names(directory) for kind in KINDS}
    tensors = {name: tensor for name, tensor in read_adapter(directory).items() if name not in heads}
    model = trunk
    if any(name.startswith(f"{trunk.base_model_prefix}.") for name in tensors):
        model = Whole(trunk)
    announce_quantized(model)
    inject_adapter_in_model(config, model)
    put_adapter(model, tensors, directory)


class Whole(nn.Module):
    """The backbone under the name that it has in the whole model: a configuration may choose layers by such names."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.config, self.base_model_prefix = trunk.config, trunk.base_model_prefix
        self.add_module(trunk.base_model_prefix, trunk)


def save_adapter(model: nn.Module, trunk: nn.Module, base: str, directory: Path) -> None:
    """The trunk's adapter and the head, as peft's save_pretrained writes them for a sequence classifier."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapters: Any = trunk.peft_config
    config = adapters[NAME]
    prefix = f"{trunk.base_model_prefix}."
    tensors = {
        f"{ADAPTER_PREFIX}{prefix}{name}": tensor.detach().contiguous().cpu()
        for name, tensor in get_peft_model_state_dict(trunk, adapter_name=NAME).items()
    }
    score: Any = model.score
    tensors[f"{ADAPTER_PREFIX}score.weight"] = score.weight.detach().to(torch.float32).contiguous().cpu()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    written: dict[str, Any] = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    written |= {
        "base_model_name_or_path": base,
        "task_type": "SEQ_CLS",
        "modules_to_save": ["score"],
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(written, indent=2, default=str) + "\n")
