"""The recipes on a really pretrained tiny model, run as a user runs them, learn what their headers say."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.long]
Ends = Callable[[Path], tuple[dict[str, float], dict[str, float]]]
Metrics = Callable[[Path], list[dict[str, float]]]


@pytest.fixture
def one_thread(environment: dict[str, str]) -> dict[str, str]:
    """A model this small gains nothing from a second one, which other tests need."""
    return {**environment, "OMP_NUM_THREADS": "1"}


def test_stories(
    repo: Path, shared: Path, tmp_path: Path, one_thread: dict[str, str], metrics: Metrics
) -> None:
    """In half of the recipes' steps: sft lowers the loss by more than 0.6 nat; ppo raises the reward by 0.3 and more
    with a bounded KL."""
    model = f"policy.path={shared / 'models/stories260k'}"
    data = f"data.train=[{{path: {shared / 'data/alpaca/alpaca_2000.messages.jsonl'}}}]"
    sft, ppo = [model, data, "train.steps=60"], [model, "train.steps=30"]
    for task, overrides in (("sft", sft), ("ppo", ppo)):
        run = tmp_path / task
        command = ["rlhfctl", task, f"stories/{task}", *overrides, "--run-dir", str(run)]
        done = subprocess.run(command, cwd=repo, env=one_thread, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str(run)
    losses = [row["loss/sft"] for row in metrics(tmp_path / "sft")]
    assert losses[0] - sum(losses[-4:]) / 4 > 0.6
    rows = metrics(tmp_path / "ppo")
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-5:]) / 5 - rewards[0] > 0.3
    assert max(row["kl/reference"] for row in rows) < 0.4
    assert rows[-1]["reward/different_words"] > 0.75
    assert (
        not (tmp_path / "ppo/quarantine.jsonl").exists()
        or not (tmp_path / "ppo/quarantine.jsonl").read_text()
    )


def test_a_taste_is_learned_from_pairs_of_stories(
    repo: Path, shared: Path, tmp_path: Path, one_thread: dict[str, str], ends: Ends
) -> None:
    """Pairs judged by a rule that no recipe states: fresh ones are told apart after a quarter of the recipe's steps,
    and not by their length."""
    model = f"policy.path={shared / 'models/stories260k'}"

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    run(
        sys.executable, str(repo / "recipes/stories/pairs.py"), str(shared / "models/stories260k"), ".stories"
    )
    quarter = ["train.steps=30", "train.eval_every=30"]
    run("rlhfctl", "rm", "stories/rm", model, *quarter, "--run-dir", ".stories/rm")
    _, after = ends(tmp_path / ".stories/rm")
    assert after["eval/accuracy"] >= 0.85
    assert after["eval/length_accuracy"] < 0.65
