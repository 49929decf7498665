"""Which files a checkpoint or an adapter consists of: those that transformers and peft read.

What else lies in the directory (a shard that a former save left, another adapter) is not part of it.
"""

import json
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
HEAD_FILE = "value_head.safetensors"  # a head that lies beside its backbone


def weight_files(directory: Path) -> list[Path]:
    """The files that are there of those that are read; where none has a name that is, every *.safetensors."""
    every = sorted(directory.glob("*.safetensors"))
    if (directory / ADAPTER_CONFIG).is_file():
        names = {"adapter_model.safetensors"}
    elif (directory / "model.safetensors").is_file():
        names = {"model.safetensors"}
    else:
        names = indexed(directory / "model.safetensors.index.json")
    return [file for file in every if file.name in names] or every


def head_files(directory: Path) -> list[Path]:
    """As weight_files, and the file of a head beside them."""
    files, beside = weight_files(directory), directory / HEAD_FILE
    return [*files, beside] if beside.is_file() and beside not in files else files


def indexed(index: Path) -> set[str]:
    """The shards that an index lists; none where it cannot be read."""
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
