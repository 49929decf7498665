"""The checkpoint under an adapter: found, checked to be the one it was trained on, and kept in as many bits."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfctl.base_weights import base_facts, read_facts, refuse_other_base, write_facts
from rlhfctl.errors import Refused
from rlhfctl.models.quantize import quantize
from rlhfctl.recipe.sections import Policy


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def base_of(directory: Path) -> Path:
    """The checkpoint an adapter was trained on. Raises Refused where it is not on this machine."""
    given = json.loads((directory / "adapter_config.json").read_text()).get("base_model_name_or_path")
    for place in (Path(str(given)), directory / str(given)):
        if given and place.is_dir():
            return place
    if given:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(given, local_files_only=True))
        except Exception:  # the library has a class for each way of not being in the cache
            pass
    raise Refused(f"the adapter {directory} belongs to {given}, which is not on this machine")


def checked_base(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The base, and what was written down of it. Raises Refused for weights that are not those of the training."""
    base, facts = base_of(directory), read_facts(directory)
    refuse_other_base(facts, str(base), directory)
    return base, facts


def quantize_as(facts: dict[str, Any], trunk: nn.Module, device: torch.device) -> None:
    """The backbone in the bits that the adapter was trained over."""
    if facts.get("quantization", "none") != "none":
        quantize(trunk, facts["quantization"], facts["quantization_block"], device)


def write_base(policy: Policy, directory: Path) -> None:
    """Beside an adapter: the base that it belongs to."""
    assert policy.path is not None
    write_facts(directory, base_facts(policy.path, policy.quantization, policy.quantization_block))
