"""The corpus: its entries by name, and sides with the tokens their owners declare."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.templates.sides import Side, load_side

SCALAR = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}  # GGUF type and struct format


@pytest.fixture(scope="session")
def entries(shared: Path) -> dict[str, dict[str, Any]]:
    listed = json.loads((shared / "chat-templates" / "index.json").read_text())["templates"]
    return {entry["name"]: entry for entry in listed}


@pytest.fixture(scope="session")
def declared() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What --policy-tokens would be given; what is not established is left out."""

    def tokens(entry: dict[str, Any]) -> dict[str, Any]:
        known = dict(entry["tokens"])
        if entry["tokenizer_adds_bos"] is not None:
            known["adds_bos"] = entry["tokenizer_adds_bos"]
        return known

    return tokens


@pytest.fixture(scope="session")
def bare_side(shared: Path, entries: dict[str, dict[str, Any]], declared: Callable) -> Callable[[str], Side]:
    """The side of a template of the corpus, by name."""

    def load(name: str) -> Side:
        entry = entries[name]
        return load_side(shared / "chat-templates" / entry["file"], tokens=declared(entry))

    return load


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with metadata and no tensors."""

    def string(text: str) -> bytes:
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    def value(item: Any) -> bytes:
        if isinstance(item, str):
            return struct.pack("<I", 8) + string(item)
        if not isinstance(item, list):
            kind, form = SCALAR[type(item)]
            return struct.pack("<I", kind) + struct.pack(form, item)
        if isinstance(item[0], str):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
        kind, form = SCALAR[type(item[0])]
        return struct.pack("<IIQ", 9, kind, len(item)) + struct.pack(f"<{len(item)}{form[1]}", *item)

    body = b"".join(string(key) + value(item) for key, item in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + body)
    return path


@pytest.fixture(scope="session")
def gguf() -> Callable[[Path, dict[str, Any]], Path]:
    """Writes a GGUF file and returns its path."""
    return write_gguf
