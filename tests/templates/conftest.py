"""The corpus: its entries by name, and sides with the tokens their owners declare."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.templates.sides import Side, load_side


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
