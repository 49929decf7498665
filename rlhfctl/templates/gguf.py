"""The chat template and special tokens of a GGUF file, from its metadata alone: no weights, no gguf package.

The tokenizer itself is not rebuilt (its merges are stored for another engine), so findings that need token ids are not
made for this side.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from rlhfctl.errors import UsageError
from rlhfctl.templates.sides import Side

MAGIC = b"GGUF"
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
MAX_ITEMS = 10_000_000
MAX_STRING = 64 * 1024 * 1024
IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}


def read_gguf(path: Path) -> Side:
    """Raises UsageError for a file that is no GGUF, or is cut off."""
    try:
        with path.open("rb") as stream:
            metadata = _metadata(stream)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (struct.error, ValueError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not a readable GGUF file: {error}") from None
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    tokens: dict[str, str | None] = {}
    for name, key in IDS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        inside = isinstance(index, int) and isinstance(vocabulary, list) and 0 <= index < len(vocabulary)
        tokens[name] = vocabulary[index] if inside else None  # type: ignore[index]
    template = metadata.get("tokenizer.chat_template")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    side = Side(name=str(path), path=None, tokens=tokens, source="GGUF metadata")
    side.template = template if isinstance(template, str) else None
    side.problem = "" if side.template is not None else "has no chat template"
    side.sources = {"GGUF metadata": side.template} if side.template is not None else {}
    side.declared_adds_bos = adds_bos if isinstance(adds_bos, bool) else None
    side.known = frozenset(
        {"bos", "eos", "pad"} | ({"adds_bos"} if side.declared_adds_bos is not None else set())
    )
    if isinstance(vocabulary, list):
        side.config = {"vocab_size": len(vocabulary)}
    return side


def _metadata(stream: BinaryIO) -> dict[str, Any]:
    if stream.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = _scalar(stream, "<I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not supported")
    _scalar(stream, "<Q")  # tensors
    count = _scalar(stream, "<Q")
    if count > MAX_ITEMS:
        raise ValueError(f"{count} metadata entries")
    return {_string(stream): _value(stream, _scalar(stream, "<I")) for _ in range(count)}


def _scalar(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _string(stream: BinaryIO) -> str:
    size = _scalar(stream, "<Q")
    if size > MAX_STRING:
        raise ValueError(f"a string of {size} bytes")
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("it is cut off")
    return data.decode("utf-8", errors="replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(stream)
    if kind == ARRAY:
        inner, count = _scalar(stream, "<I"), _scalar(stream, "<Q")
        if count > MAX_ITEMS:
            raise ValueError(f"an array of {count} items")
        return [_value(stream, inner) for _ in range(count)]
    if kind not in SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _scalar(stream, SCALARS[kind])
