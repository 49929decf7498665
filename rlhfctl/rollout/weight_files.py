"""Weights on their way to a server: safetensors files in a directory that trainer and servers see."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BUCKET = 1 << 30  # bytes of one file; one bucket exists in memory at a time
MEMORY = Path("/dev/shm")
PREFIX = "rlhfctl-sync-"
LEFT_SECONDS = 3600.0


def write(weights: Iterable[tuple[str, Tensor]], directory: Path, bucket: int = BUCKET) -> int:
    """bucket_00000.safetensors, ...: each tensor once, in order; returns how many tensors."""
    held: dict[str, Tensor] = {}
    size = count = files = 0
    for name, tensor in weights:
        if held and size + tensor.nbytes > bucket:
            save_file(held, directory / f"bucket_{files:05d}.safetensors")
            held, size, files = {}, 0, files + 1
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        count += 1
    save_file(held, directory / f"bucket_{files:05d}.safetensors")
    return count


def read(directory: str, tensors: int) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time. Raises FileNotFoundError where the directory is not seen from here, ValueError where the
    files do not hold as many tensors as were written."""
    paths = sorted(Path(directory).glob("bucket_*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no weights in {directory}, as the server sees it")
    count = 0
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dictionary
                count += 1
                yield name, file.get_tensor(name)
    if count != tensors:
        raise ValueError(f"{count} tensors in {directory}, {tensors} were written")


def place(size: int) -> Path:
    """Where files of `size` bytes go by default: in memory where they fit with room to spare."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > size + size // 4:
        return MEMORY
    return Path(tempfile.gettempdir())


def directory(chosen: str | None, size: int) -> Path:
    """A new directory for one sync, in `chosen` or the default place; what killed runs of this machine left in the
    default place goes first."""
    if chosen is not None:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=chosen))
    for root in (MEMORY, Path(tempfile.gettempdir())):
        for left in root.glob(f"{PREFIX}*-*"):
            owner = left.name.removeprefix(PREFIX).partition("-")[0]
            alive = owner.isdigit() and Path(f"/proc/{owner}").exists()
            # Of another container that shares this memory the process cannot be seen.
            if not alive and time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place(size)))
