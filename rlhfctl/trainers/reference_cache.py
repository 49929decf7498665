"""The frozen reference's hidden states on disk, for runs that measure to the same weights on the same rows.

One safetensors file for each set of weights (their fingerprint, dtype and bits) under one configuration, which says how
they are used (rotation, norms, an adapter's scale); in it one tensor [actions, H] a row, under the hash of its token
ids and action places: a row that changed is another row. Written whole, aside and renamed.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhfctl.base_weights import FILE, fingerprint, local
from rlhfctl.checkpoint_files import ADAPTER_CONFIG
from rlhfctl.recipe.sections import Policy

CONFIGURATION = ("config.json", ADAPTER_CONFIG, FILE)


def file_of(directory: str, spec: Policy, dtype: str) -> Path | None:
    """Where the states of these weights are kept; None where the weights cannot be told (a hub id not in the cache)."""
    place = local(str(spec.path))
    if place is None:
        return None
    bits: str = spec.quantization
    if bits in ("nf4", "fp4"):
        bits += str(spec.quantization_block)
    config = hashlib.sha256()
    for file in (place / name for name in CONFIGURATION):
        config.update(file.read_bytes() if file.is_file() else b"\0")
    parts = (fingerprint(place)[:32], config.hexdigest()[:16], dtype.removeprefix("torch."), bits)
    return Path(directory) / f"{'-'.join(parts)}.safetensors"


def row_keys(ids: Sequence[list[int]], trained: Sequence[list[int]]) -> list[str]:
    return [
        hashlib.sha256(json.dumps([row, places]).encode()).hexdigest()
        for row, places in zip(ids, trained, strict=True)
    ]


def read(file: Path, keys: Sequence[str]) -> dict[int, Tensor]:
    """The rows (by their place in `keys`) that the file holds; none where it is damaged."""
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as held:
            known = set(held.keys())
            return {row: held.get_tensor(key) for row, key in enumerate(keys) if key in known}
    except SafetensorError:
        return {}


def write(file: Path, keys: Sequence[str], states: Sequence[Tensor]) -> None:
    """These rows, and those that the file holds already; a damaged one is replaced."""
    tensors: dict[str, Tensor] = {}
    if file.is_file():
        with suppress(SafetensorError), safe_open(file, framework="pt") as held:
            tensors = {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118  no mapping
    tensors |= {key: state.contiguous() for key, state in zip(keys, states, strict=True)}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, aside)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
