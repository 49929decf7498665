"""One side read from the metadata of a GGUF file: template, special tokens, tokenizer; no weights, no gguf package."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import Tokenizer

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
        with path.open("rb", buffering=1 << 20) as stream:
            metadata = _metadata(stream)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (struct.error, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a readable GGUF file: {error}") from None
    vocabulary = metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(vocabulary, list) or not all(isinstance(token, str) for token in vocabulary):
        raise UsageError(f"{path} is not a readable GGUF file: tokenizer.ggml.tokens is no list of strings")
    tokens: dict[str, str | None] = {}
    for name, key in IDS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        tokens[name] = vocabulary[index] if isinstance(index, int) and 0 <= index < len(vocabulary) else None
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
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    side.config = {"vocab_size": len(vocabulary)} if vocabulary else {}
    if isinstance(length, int):
        side.config["max_position_embeddings"] = length
    side.rebuild = lambda: _tokenizer(side, path, metadata)
    return side


def _tokenizer(side: Side, path: Path, metadata: dict[str, Any]) -> Tokenizer | None:
    """None for a kind that neither this project nor transformers rebuilds. side.note says so, and also where ids are
    transformers' reading, which may differ from the model's. Raises UsageError for a vocabulary that contradicts
    itself."""
    from rlhfctl.templates.gguf_tokenizer import CannotRebuild, rebuild

    try:
        return rebuild(metadata)
    except CannotRebuild as error:
        tokenizer = _by_transformers(path, metadata)
        what = (
            "findings that need token ids are not made"
            if tokenizer is None
            else "read as transformers reads it"
        )
        side.note = f"its tokenizer {error}: {what}"
        return tokenizer
    except Exception as error:  # the binding raises bare Exception
        raise UsageError(f"{path} is not a readable GGUF file: its tokenizer: {error}") from None


def _by_transformers(path: Path, metadata: dict[str, Any]) -> Tokenizer | None:
    """What transformers makes of the file where it and the gguf package are installed; None where it cannot. What is
    added to a text is taken from the file, which transformers does not read for that."""
    if "tokenizer.ggml.tokens" not in metadata or not all(map(find_spec, ("transformers", "gguf"))):
        return None
    from transformers import AutoTokenizer

    from rlhfctl.templates.gguf_tokenizer import post_processor

    try:
        found = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        tokenizer: Tokenizer = found.backend_tokenizer
    except Exception:  # it raises whatever a converter of an unknown kind meets
        return None
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    tokenizer.post_processor = post_processor(metadata, byte_level)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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


def _bytes(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("it is cut off")
    return data


def _scalar(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, _bytes(stream, struct.calcsize(form)))[0]


def _string(stream: BinaryIO) -> str:
    size = int.from_bytes(_bytes(stream, 8), "little")
    if size > MAX_STRING:
        raise ValueError(f"a string of {size} bytes")
    return _bytes(stream, size).decode("utf-8", errors="replace")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(stream)
    if kind == ARRAY:
        inner, count = _scalar(stream, "<I"), _scalar(stream, "<Q")
        if count > MAX_ITEMS:
            raise ValueError(f"an array of {count} items")
        if inner in SCALARS:
            form = f"<{count}{SCALARS[inner][1]}"
            return list(struct.unpack(form, _bytes(stream, struct.calcsize(form))))
        return [_value(stream, inner) for _ in range(count)]
    if kind not in SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _scalar(stream, SCALARS[kind])
