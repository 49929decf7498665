"""Places that this user may not look at, a user without a home, and a standard input that is closed."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfctl.data.overlap import overlapping
from rlhfctl.data.prepared import cache_directory
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.machine import tracking_findings
from rlhfctl.preflight.survey import storage_rows
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.sections import DataSource
from tests.cli.conftest import COMMAND

# As root everything is open: what lies in theirs/ is closed to this process alone.
CLOSED = """
import os, sys
stat = os.stat
def closed(path, *given, **more):
    if str(path).startswith("theirs/"):
        raise PermissionError(13, "Permission denied", path)
    return stat(path, *given, **more)
os.stat = closed
from rlhfctl.cli.main import run
sys.exit(run(sys.argv[1:]))
"""
RECIPE = "{task: sft, name: a, policy: {path: theirs/m}, data: {train: [{path: theirs/d.jsonl}]}, train: {steps: 1}}"


@pytest.mark.parametrize(
    "argv",
    [
        ["sft", "theirs/recipe.yaml", "-n"],
        ["sft", "mine.yaml", "-n", "--run-dir", "theirs/run"],
        ["sft", "--resume", "--run-dir", "theirs/run"],
        ["report", "theirs/run"],
        ["inspect-template", "theirs/m"],
    ],
)
def test_what_is_closed_to_this_user(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    done = subprocess.run([sys.executable, "-c", CLOSED, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("theirs/")
    assert done.stderr.endswith(" is closed to this user: permission denied\n")


def test_a_closed_model_and_closed_data_are_findings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    argv = [sys.executable, "-c", CLOSED, "sft", "mine.yaml", "-n", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    told = json.loads(done.stdout)
    assert (done.returncode, told["status"]) == (2, "invalid")
    wrong = {
        (each["id"], each["detail"]) for each in told["findings"] if each["severity"] in ("error", "warning")
    }
    assert wrong == {
        ("C002", f"theirs/{name} is closed to this user: permission denied") for name in ("m", "d.jsonl")
    }


def test_training_data_that_is_closed_overlaps_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*given: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", "theirs/d.jsonl")

    monkeypatch.setattr(os, "stat", closed)
    assert overlapping([], [DataSource(path="theirs/d.jsonl")]) == 0


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container: no HOME, and a number that /etc/passwd does not know."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "RLHFCTL_CACHE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    assert tracking_findings(Inputs(load_recipe(str(tmp_path / "mine.yaml")).recipe, None, True)) == []
    assert cache_directory() is None
    assert [row.name for row in storage_rows()][-1] == "hub cache"


def test_a_recipe_from_a_standard_input_that_is_closed(tmp_path: Path) -> None:
    argv = f'exec "{COMMAND[0]}" -m rlhfctl sft - --json <&-'
    done = subprocess.run(argv, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["status"]) == (2, "invalid")
    assert done.stderr == "standard input is closed: give it a recipe, or name one\n"


def test_a_tilde_that_no_shell_expands(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    argv = [*COMMAND, "sft", "mine.yaml", "-n", "--run-dir=~/runs/a", "--json"]
    env = {**os.environ, "HOME": str(tmp_path / "home")}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert json.loads(done.stdout)["run_dir"] == f"{tmp_path}/home/runs/a"
    assert (tmp_path / "home/runs/a/preflight.json").is_file()
    assert not (tmp_path / "~").exists()
