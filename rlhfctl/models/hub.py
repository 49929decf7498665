"""The files of a model by its hub id, as its weights are loaded: from the local cache, or downloaded."""

import re
from pathlib import Path

from rlhfctl.errors import Unable
from rlhfctl.templates.hub import hub_failure

# Weights in other forms lie beside the safetensors of many models.
NOT_READ = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]


def is_hub_id(path: str) -> bool:
    """ORGANISATION/NAME, and nothing of that name here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)) and not Path(path).exists()


def local_directory(path: str) -> Path:
    """Where the files of a model directory or hub id are. Raises Unable where the hub does not give them."""
    if not is_hub_id(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=NOT_READ))
    except Exception as error:  # offline, unknown name, gated: the library has many classes for it
        cause, fix = hub_failure(error, path)
        raise Unable(f"{path} is no directory here and did not come from the hub: {cause}; {fix}") from error
