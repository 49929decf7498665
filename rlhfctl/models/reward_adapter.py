"""A reward model as a LoRA adapter with its head: read from, and written in, the layout that peft reads."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models.lora import announce_quantized
from rlhfctl.models.value_head import ADAPTER_PREFIX, plain_name

NAME = "default"  # peft's name of the one adapter


def load_adapter(trunk: nn.Module, directory: Path) -> None:
    """Put the adapter's weights into a bare backbone. Raises Refused where a weight finds no place."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(str(directory))
    config.modules_to_save = None  # the head is ours
    config.task_type = None
    announce_quantized(trunk)
    trunk.add_adapter(config)  # type: ignore[operator]
    prefix = f"{trunk.base_model_prefix}."
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "lora_" in name:
                tensors[plain_name(name).removeprefix(prefix)] = tensor
    report: Any = set_peft_model_state_dict(trunk, tensors)
    if not tensors or report.unexpected_keys:
        what = report.unexpected_keys[0] if tensors else "no LoRA weights at all"
        raise Refused(f"the adapter {directory} does not fit its base model: it holds {what}")


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
