"""What a checkpoint holds, from the headers of its safetensors files: names, shapes, sizes; no tensor library."""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhfctl.checkpoint_files import head_files

MAX_HEADER = 100 << 20  # the format's own limit
DTYPE_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: bytes [begin, end) of its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(slots=True)
class Checkpoint:
    """problems: sentences on files that are cut or missing. pickled: weights in a form that is never opened."""

    tensors: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    pickled: bool = False

    @property
    def empty(self) -> bool:
        return not self.tensors

    @property
    def parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.tensors.values())


def read_checkpoint(directory: Path) -> Checkpoint:
    """The headers of the files that a model is read from, and whether the index's shards are all there."""
    checkpoint = Checkpoint(pickled=any(any(directory.glob(form)) for form in PICKLES))
    files = head_files(directory)
    for file in files:
        problem = _read_header(file, checkpoint.tensors)
        if problem:
            checkpoint.problems.append(problem)
    index = directory / "model.safetensors.index.json"
    if index.is_file() and not (directory / "model.safetensors").is_file():
        try:
            listed = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            checkpoint.problems.append(f"{index} is not a readable index")
            listed = set()
        for name in sorted(listed - {file.name for file in files}):
            checkpoint.problems.append(f"{directory / name} is missing (the index lists it)")
    return checkpoint


def _read_header(file: Path, tensors: dict[str, Entry]) -> str | None:
    """Add the file's tensors; a sentence where the file is damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER, size):
                return f"{file} is not a whole safetensors file: its header would be {length} bytes of {size}"
            header: dict[str, Any] = json.loads(stream.read(length))
        start = 8 + length
        entries = {
            name: Entry(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return f"{file} is not a readable safetensors file ({type(error).__name__}: {error})"
    end = max((entry.end for entry in entries.values()), default=start)
    if end != size:
        return f"{file} is cut or overlong: its header describes {end} bytes, the file has {size}"
    tensors.update(entries)
    return None


def read_floats(entry: Entry) -> list[float] | None:
    """The values of a small F32, F16 or BF16 tensor; None for another type."""
    if entry.dtype not in ("F32", "F16", "BF16"):
        return None
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        raw = stream.read(entry.end - entry.begin)
    if entry.dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    code = "e" if entry.dtype == "F16" else "f"
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw))


def score_read(config: dict[str, Any]) -> str | None:
    """How a reward model's score is read (models/reward_model.py); None without a configuration, as of an adapter."""
    if not config:
        return None
    facts = config.get("reward_model")
    if isinstance(facts, dict) and facts.get("read"):
        return str(facts["read"])
    names = config.get("architectures") or ()
    return "step_end" if any(str(name).endswith("ForTokenClassification") for name in names) else "last_token"


def parameters_of_config(config: dict[str, Any]) -> int | None:
    """About how many parameters a decoder of this configuration has; None where the usual keys are absent."""
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner, vocab = int(config["intermediate_size"]), int(config["vocab_size"])
        heads = int(config["num_attention_heads"])
        head = int(config.get("head_dim") or hidden // heads)
        groups = int(config.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError):
        return None
    attention = hidden * head * (2 * heads + 2 * groups)
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + 3 * hidden * inner)
