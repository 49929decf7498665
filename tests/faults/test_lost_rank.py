"""Two processes, and what may happen to one: a hang, a kill, other processes afterwards, lost logs, a wild clock.

One run suffers all of it and must end with the numbers of a run that nothing happened to.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfctl.run_dir import RunDir

pytestmark = pytest.mark.heavy
STEPS = 150
LIMIT = 6.0  # launch.timeout
# Loaded by every process of the run: at every look time.time() jumps back and forth by ten years.
SITE = """
import time
real, jumps = time.time, [0]
def jumping():
    jumps[0] += 1
    return real() + (315e6 if jumps[0] % 2 else -315e6)
time.time = jumping
"""


def records(run: RunDir) -> list[dict[str, float]]:
    lines = run.metrics.read_text().splitlines(keepends=True) if run.metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(run: RunDir, process: "subprocess.Popen[str]", step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in records(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def beat(run: RunDir, rank: int) -> dict[str, int]:
    record: dict[str, int] = json.loads((run.logs / f"latest/rank{rank}.beat").read_text())
    return record


def test_nothing_is_lost(train: Callable[..., RunDir], tmp_path: Path) -> None:
    steps = [f"train.steps={STEPS}", "train.save_every=2"]
    whole = records(train("sft", "whole", f"train.steps={STEPS}", "train.save_every=0"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = RunDir(tmp_path / "run")

    def start(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "rlhfctl", "sft", *arguments, "--run-dir", str(run.path)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )

    two = ["launch.nproc_per_node=2", "launch.max_restarts=1", f"launch.timeout={LIMIT}", "launch.threads=1"]
    process = start(str(tmp_path / "sft.yaml"), *steps, *two)
    wait_for_step(run, process, 4)
    hung = beat(run, 1)["pid"]
    os.kill(hung, signal.SIGSTOP)
    stopped = time.monotonic()
    while Path(f"/proc/{hung}").exists():  # the launcher ends it
        assert time.monotonic() - stopped < LIMIT + 30
        time.sleep(0.05)
    assert time.monotonic() - stopped > LIMIT - 1
    reached = max(row["step"] for row in records(run))
    wait_for_step(run, process, reached + 3)  # started again, from the newest checkpoint
    killed = beat(run, 1)["pid"]
    assert killed != hung
    os.kill(killed, signal.SIGKILL)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    stopped_there = r"in (train|the checkpoint) of step \d+ \(its process is stopped \(SIGSTOP\)\)"
    hangs = f"rank 1 hangs {stopped_there}; rank 0 has waited"
    assert re.search(hangs, stderr), stderr
    assert "rank:      1 of 2\nexception: the worker was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr
    lost_at = max(row["step"] for row in records(run))
    assert lost_at < STEPS

    # One process instead of two, and its logs are removed under it.
    process = start("--resume", "launch.nproc_per_node=1", "launch.max_restarts=0")
    wait_for_step(run, process, lost_at + 3)
    shutil.rmtree(run.logs)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert "resuming with processes 2 -> 1: the numbers may differ in the last digits" in stderr
    assert run.read_status()["state"] == "done"

    found = records(run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, whole, strict=True):
        # The same rows in the same order, whoever trained them; sums in another order.
        assert (ours["tokens"], ours["tokens_trained"]) == (theirs["tokens"], theirs["tokens_trained"])
        assert ours["loss/sft"] == pytest.approx(theirs["loss/sft"], abs=1e-3)
        assert 0 <= ours["seconds/step"] < 60
    assert found[5]["loss/sft"] == pytest.approx(whole[5]["loss/sft"], abs=1e-6)
