"""Reading what lies in a model directory: text and JSON with one-sentence errors, hub ids, the safetensors header."""

import json
import re
import struct
from pathlib import Path
from typing import Any

from rlhfctl.errors import Unable, UsageError, is_disk_full
from rlhfctl.templates.hub import chain, hub_failure

TOKENIZER_FILES = ["*.json", "*.jinja", "additional_chat_templates/*.jinja"]
NOT_WANTED = ["*.index.json"]
MAX_HEADER = 100 * 1024 * 1024  # the safetensors format's own limit
EMBEDDINGS = re.compile(r"(embed_tokens|word_embeddings|wte|tok_embeddings|embed_in)\.weight$")


def read_text(path: Path) -> str:
    """Text mode, as transformers reads templates: CRLF becomes LF. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """None where the file is absent. Raises UsageError for a file that is no JSON object."""
    if not path.is_file():
        return None
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}:{error.colno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise UsageError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def resolve_directory(path: str) -> Path:
    """The directory of a model: itself, or the snapshot of a hub id, whose small files are downloaded, no weights."""
    place = Path(path)
    if place.is_dir():
        return place
    if place.exists():
        raise UsageError(
            f"{path} is a file; give a model or tokenizer directory, a .jinja or .gguf file, or a recipe"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UsageError(f"{path} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=TOKENIZER_FILES, ignore_patterns=NOT_WANTED))
    except Exception as error:  # offline, unknown name, gated: the library has many classes for it
        cause, fix = hub_failure(error, path)
        kind = Unable if any(map(is_disk_full, chain(error))) else UsageError
        raise kind(f"{path} is no directory here and did not come from the hub: {cause}; {fix}") from error


def embedding_rows(directory: Path) -> int | None:
    """Rows of the input embedding, read from the headers of *.safetensors; None where there are no weights."""
    for file in sorted(directory.glob("*.safetensors")):
        for name, entry in _header(file).items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if EMBEDDINGS.search(name) and isinstance(shape, list) and len(shape) == 2:
                return int(shape[0])
    return None


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, or {} if it is damaged: whether weights load is another check's business."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > MAX_HEADER:
                return {}
            header = json.loads(stream.read(size))
    except (OSError, struct.error, ValueError):
        return {}
    return header if isinstance(header, dict) else {}
