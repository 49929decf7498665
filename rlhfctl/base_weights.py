"""Which weights an adapter was trained on: a fingerprint of a checkpoint, and the refusal of another one.

An adapter's numbers mean nothing on other weights, and loading them there fails in silence. Standard library only.
"""

import hashlib
import json
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhfctl.errors import Refused

FILE = "adapter_base.json"
PIECE = 4096  # bytes read at the start, in the middle and at the end of each tensor


def fingerprint(directory: str | Path) -> str:
    """sha256 over every tensor's name, type and shape and three pieces of its bytes; of pickled weights over three
    pieces of each file. Training moves every weight, so that it shows in the pieces."""
    place = Path(directory)
    files = sorted([*place.glob("*.safetensors"), *place.glob("pytorch_model*.bin")])
    return _fingerprint(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    found = hashlib.sha256()
    for name, size, _ in files:
        with open(name, "rb") as stream:
            if not name.endswith(".safetensors"):
                add_pieces(found, stream, 0, size)
                continue
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
            for tensor in sorted(set(header) - {"__metadata__"}):
                entry = header[tensor]
                found.update(f"{tensor} {entry['dtype']} {entry['shape']}".encode())
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                add_pieces(found, stream, begin, end)
    return found.hexdigest()


def add_pieces(found: Any, stream: Any, begin: int, end: int) -> None:
    for start in (begin, (begin + end) // 2, max(begin, end - PIECE)):
        stream.seek(start)
        found.update(stream.read(min(PIECE, end - start)))


def local(path: str) -> Path | None:
    """The directory of a model; None for a hub id that is not in the local cache."""
    if os.path.isdir(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except Exception:  # the library has a class for each way of not being in the cache
        return None


def base_facts(path: str, quantization: str, block: int) -> dict[str, Any]:
    """What has to be the same again for an adapter to be the same model."""
    place = local(path)
    return {
        "path": path,
        "fingerprint": None if place is None else fingerprint(place),
        "quantization": quantization,
        "quantization_block": block,
    }


def refuse_other_base(facts: dict[str, Any], path: str, adapter: str | Path) -> None:
    """Raises Refused where the weights at `path` are not those that the facts tell of."""
    place = local(path)
    wanted = facts.get("fingerprint")
    if wanted is None or place is None:
        return
    if (found := fingerprint(place)) != wanted:
        raise Refused(
            f"the adapter in {adapter} was trained on other base weights than {path} holds now (fingerprint "
            f"{wanted[:12]}, found {found[:12]}): put the old weights back, or start a new run"
        )


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    (directory / FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def read_facts(directory: Path) -> dict[str, Any]:
    """{} beside an adapter that another program wrote."""
    file = directory / FILE
    return json.loads(file.read_text()) if file.is_file() else {}
