"""The shipped recipes for a laptop, run as a user runs them, learn what their headers say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy


def environment(repo: Path) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    keep = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return {**keep, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(repo)}


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_quickstart(repo: Path, tmp_path: Path) -> None:
    """The demonstrations teach about 23 %; the reward alone adds at least 40 points, and the steps are right too."""
    done = subprocess.run(
        ["sh", str(repo / "recipes/quickstart/run.sh"), str(tmp_path / "out")],
        cwd=repo,
        env=environment(repo),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    header, sft, ppo = done.stdout.splitlines()[-3:]
    assert header.startswith("stage")
    assert (sft.split()[:2], ppo.split()[:2]) == (["sft", "done"], ["ppo", "done"])
    evaluations = [row for row in metrics(tmp_path / "out/ppo") if "eval/accuracy" in row]
    before, after = evaluations[0], evaluations[-1]
    assert 0.1 < before["eval/accuracy"] < 0.4
    assert after["eval/accuracy"] - before["eval/accuracy"] >= 0.4
    assert after["eval/path_accuracy"] - before["eval/path_accuracy"] >= 0.4
    again = subprocess.run(
        ["sh", str(repo / "recipes/quickstart/run.sh"), str(tmp_path / "out")],
        cwd=repo,
        env=environment(repo),
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout.splitlines()[-3:]) == (0, [header, sft, ppo])
    assert "is done at step" in again.stderr


def test_stories(repo: Path, shared: Path, tmp_path: Path) -> None:
    """sft lowers the loss by more than a nat; ppo raises the reward by 0.3 and more with a bounded KL."""
    model = f"policy.path={shared / 'models/stories260k'}"
    data = f"data.train=[{{path: {shared / 'data/alpaca/alpaca_2000.messages.jsonl'}}}]"
    for task, overrides in (("sft", [model, data]), ("ppo", [model])):
        run = tmp_path / task
        command = ["rlhfctl", task, f"stories/{task}", *overrides, "--run-dir", str(run)]
        done = subprocess.run(command, cwd=repo, env=environment(repo), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str(run)
    losses = [row["loss/sft"] for row in metrics(tmp_path / "sft")]
    assert losses[0] - sum(losses[-4:]) / 4 > 1.0
    rows = metrics(tmp_path / "ppo")
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-5:]) / 5 - rewards[0] > 0.3
    assert max(row["kl/reference"] for row in rows) < 0.4
    assert rows[-1]["reward/different_words"] > 0.75
    assert (
        not (tmp_path / "ppo/quarantine.jsonl").exists()
        or not (tmp_path / "ppo/quarantine.jsonl").read_text()
    )
