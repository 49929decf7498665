"""The script of docs/ci.md, run as it is written: it passes, and fails for each of its reasons."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
def test_the_gate(repo: Path, chains: Path, tmp_path: Path) -> None:
    script = (repo / "docs/ci.md").read_text().split("```sh\n")[1].split("```")[0]
    (tmp_path / "gate.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/rlhfctl"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rlhfctl "$@"\n')
    command.chmod(0o755)
    recipe = f"""\
task: sft
extends: quickstart/sft
name: ci
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data:
  train: [{{path: {chains}/data/sft.jsonl}}]
  eval: [{{path: {chains}/data/eval.jsonl, format: qa, limit: 20}}]
train: {{steps: 2, batch_size: 4, log_every: 1}}
"""
    (tmp_path / "my.yaml").write_text(recipe)
    (tmp_path / "wrong.yaml").write_text(recipe.replace("steps: 2", "stpes: 2"))
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def gate(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["sh", "gate.sh", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    passed = gate("sft", "my.yaml", "runs/ci", "0.0")
    assert passed.returncode == 0, passed.stderr
    assert "wanted 0.0" in passed.stdout
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "done"
    assert json.loads((tmp_path / "dry-run.json").read_text())["status"] == "ok"
    assert (tmp_path / "report.html").stat().st_size > 10_000
    # The same job again: the run is done, nothing is trained twice, and an accuracy out of reach fails.
    again = gate("sft", "my.yaml", "runs/ci", "0.99")
    assert again.returncode == 1
    assert len((tmp_path / "runs/ci/metrics.jsonl").read_text().splitlines()) == 3
    assert gate("sft", "wrong.yaml", "runs/other", "0.0").returncode == 2
    assert not (tmp_path / "runs/other").exists()
