"""The proof of a resume: N + M steps in one go, against N steps, kill -9, and M more from the checkpoint.

Both are real runs of the command in processes of their own, on the CPU, with the recipe bounded to a few steps; then
every number they left is compared bit for bit (same_run.py). A recipe of several phases is killed once in each.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rlhfctl.errors import RlhfctlError, UsageError
from rlhfctl.launch.same_run import Compared, compare_runs
from rlhfctl.recipe.changes import changes
from rlhfctl.recipe.load import dump
from rlhfctl.recipe.tasks import AnyRecipe, OreoRecipe, PpoRecipe, ReftRecipe
from rlhfctl.run_dir import RunDir

EVAL_SAMPLES = 16
PROMPTS = 64  # most rows of a source that is sampled before training


class RunEnded(RlhfctlError):
    """One of the runs did not get where it should; exit code: that run's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code or 1


@dataclass(frozen=True, slots=True)
class Kill:
    """logged: the last step in metrics.jsonl when the run was killed. resumed_from: its newest whole checkpoint."""

    logged: int
    resumed_from: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """bounded: the keys that were changed to keep the runs short, `old -> new`."""

    kills: list[Kill]
    compared: list[Compared]
    bounded: dict[str, str] = field(default_factory=dict)

    @property
    def first_difference(self) -> Compared | None:
        return next((each for each in self.compared if each.difference is not None), None)


@contextmanager
def kept_or_temporary(keep: Path | None) -> Iterator[Path]:
    """An empty directory for the two runs. Raises UsageError where the one to keep is used."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="rlhfctl-verify-") as name:
            yield Path(name)
        return
    if keep.is_file() or (keep.is_dir() and any(keep.iterdir())):
        raise UsageError(f"--keep {keep} is not an empty directory: give another one")
    RunDir(keep).create()
    yield keep


def verify_resume(
    recipe: AnyRecipe, first: int, then: int, directory: Path, note: Callable[[str], None]
) -> Verdict:
    """Make both runs in `directory` (whole/ and resumed/) and compare them. note: one line of progress.

    Raises RunEnded where a run fails by itself, with that run's exit code and its words.
    """
    bounded = short(recipe, first, then)
    file = directory / "recipe.yaml"
    file.write_text(dump(bounded))
    command = [sys.executable, "-m", "rlhfctl", recipe.task]
    whole, resumed = RunDir(directory / "whole"), RunDir(directory / "resumed")
    note(f"{recipe.task}: {first} + {then} steps without a stop")
    to_the_end([*command, str(file), "--run-dir", str(whole.path), "-q"], "the uninterrupted run")

    kills = []
    start = [*command, str(file), "--run-dir", str(resumed.path), "-q"]
    again = [*command, "--resume", "--run-dir", str(resumed.path), "-q"]
    for number, step in enumerate(killed_after(bounded, first, then)):
        note(f"{recipe.task}: the same, kill -9 after step {step}")
        kill_after(again if number else start, resumed, step)
        kills.append(Kill(last_step(resumed), newest_name(resumed)))
        note(f"{recipe.task}: killed, resuming from {kills[-1].resumed_from}")
    to_the_end(again, "the resumed run")
    return Verdict(kills, compare_runs(whole, resumed), changes(recipe, bounded))


def short(recipe: AnyRecipe, first: int, then: int) -> AnyRecipe:
    """The recipe with first + then steps (of each phase), a checkpoint every `first`, and few rows evaluated.

    A warm-up of the value model ends before the checkpoint, so that policy steps lie on both sides of it.
    """
    train = {"steps": first + then, "epochs": None, "save_every": first, "log_every": 1}
    if recipe.data.eval:
        train["eval_samples"] = min(recipe.train.eval_samples or EVAL_SAMPLES, EVAL_SAMPLES)
    update: dict[str, object] = {"train": recipe.train.model_copy(update=train)}
    if isinstance(recipe, PpoRecipe | ReftRecipe | OreoRecipe):
        warmup = min(recipe.algorithm.value_warmup_steps, first - 1)
        update["algorithm"] = recipe.algorithm.model_copy(update={"value_warmup_steps": warmup})
    if isinstance(recipe, ReftRecipe) and recipe.warmup is not None:
        phase = {"steps": first + then, "epochs": None}
        update["warmup"] = recipe.warmup.model_copy(update=phase)
    if isinstance(recipe, OreoRecipe) and recipe.collect is not None:
        few = [
            each.model_copy(update={"limit": min(each.limit or PROMPTS, PROMPTS)})
            for each in recipe.data.train
        ]
        update["data"] = recipe.data.model_copy(update={"train": few})
    if isinstance(recipe, OreoRecipe) and recipe.value_fit is not None:
        fit = recipe.value_fit
        bounds = {
            "steps": first + then,
            "samples": min(fit.samples, PROMPTS),
            "held_out": min(fit.held_out, 4),
        }
        update["value_fit"] = fit.model_copy(update=bounds)
    return recipe.model_copy(update=update)


def phases(recipe: AnyRecipe) -> int:
    """Phases of one run, each with steps of its own that number through."""
    if isinstance(recipe, ReftRecipe):
        return 1 if recipe.warmup is None else 2
    if isinstance(recipe, OreoRecipe):
        return (recipe.collect.rounds if recipe.collect else 1) + (recipe.value_fit is not None)
    return 1


def killed_after(recipe: AnyRecipe, first: int, then: int) -> list[int]:
    """The steps whose checkpoint is waited for before each kill: of each phase the first one that is saved."""
    return [(phase * (first + then) // first + 1) * first for phase in range(phases(recipe))]


def launch(command: list[str]) -> "subprocess.Popen[str]":
    """On the CPU, where two runs of the same numbers are equal to the last bit."""
    return subprocess.Popen(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def to_the_end(command: list[str], what: str) -> None:
    process = launch(command)
    try:
        stderr = process.communicate()[1]
    finally:
        process.kill()
    if process.returncode:
        raise RunEnded(
            f"{what} ended with exit code {process.returncode}:\n{stderr.rstrip()}", process.returncode
        )


def kill_after(command: list[str], run: RunDir, step: int) -> None:
    """Start the run, and kill -9 it as soon as the checkpoint of `step` is there: its processes go with it."""
    checkpoint = run.checkpoints / f"step_{step:06d}"
    process = launch(command)
    try:
        while not checkpoint.is_dir():
            if process.poll() is not None:
                break
            time.sleep(0.001)
    finally:
        process.kill()
        stderr = process.communicate()[1]
    if process.returncode == 0:
        raise UsageError(
            f"the run ended before it could be killed after step {step}: give more steps with --steps N,M"
        )
    if process.returncode != -signal.SIGKILL:
        raise RunEnded(
            f"the run to be killed ended by itself with exit code {process.returncode}:\n{stderr.rstrip()}",
            process.returncode,
        )


def last_step(run: RunDir) -> int:
    """Whole lines alone: the last one may be torn."""
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    return max((int(json.loads(line)["step"]) for line in lines if line.endswith(b"\n")), default=0)


def newest_name(run: RunDir) -> str:
    newest = run.newest_checkpoint()
    return newest.name if newest else "the start"
