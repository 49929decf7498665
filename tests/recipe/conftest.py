"""A small recipe as text, written where a test wants it."""

from collections.abc import Callable
from pathlib import Path

import pytest

SFT = """\
task: sft
name: small
policy:
  path: some/model
data:
  train:
    - {path: data.jsonl}
train:
  steps: 10
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a recipe into the temporary directory, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = SFT, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write
