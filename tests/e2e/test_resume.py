"""A resumed run is the uninterrupted run, bit for bit: after Ctrl-C, and after kill -9 at any moment."""

import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from rlhfctl.launch.same_run import compare_runs
from rlhfctl.run_dir import RunDir


def start(arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "rlhfctl", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process, seconds=120):
    """False when the process ended before the condition held."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the run did not get there in time"
        time.sleep(0.0005)
    return True


def lines(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def same_result(run, reference, metrics):
    """Metrics, the last checkpoint with its optimizer, and final/."""
    assert metrics(run) == metrics(reference)
    found = compare_runs(RunDir(reference), RunDir(run))
    assert [each.where for each in found if each.difference is not None] == []
    assert any("optimizer" in each.what for each in found)
    assert any(each.what.startswith("final/") for each in found)


HEAVY = pytest.mark.heavy


@pytest.mark.parametrize("task", [pytest.param("sft", marks=HEAVY), pytest.param("rm", marks=HEAVY), "ppo"])
def test_interrupted_and_resumed_equals_uninterrupted(task, workspace, command, cli, metrics, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cli(*command(task, whole, {"train.steps": 12}), cwd=workspace)
    process = start(command(task, parts, {"train.steps": 12}), workspace)
    assert wait_for(lambda: lines(parts) >= 2, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    steps = lines(parts)
    assert 2 <= steps < 12
    assert [path.name for path in (parts / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    cli(task, "--resume", "--run-dir", str(parts), "-q", cwd=workspace)
    same_result(parts, whole, metrics)


@pytest.mark.heavy
@pytest.mark.parametrize("task", ["sft", "rm", "ppo"])
def test_kill_9_at_random_moments(task, workspace, command, cli, metrics, tmp_path):
    """Three kills: two at random moments of a step (rollout, reward, update), one while a checkpoint is written."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    longer = {"train.steps": 12, "train.save_every": 1, "train.batch_size": 128}
    cli(*command(task, whole, longer), cwd=workspace)
    rng = random.Random(f"kills {task}")
    moments = ["step", "checkpoint", "step"]
    killed, arguments = 0, command(task, parts, longer)
    for moment in moments:
        before = lines(parts)
        process = start(arguments, workspace)
        asides = [parts / "checkpoints" / f".step_{step:06d}.aside" for step in range(13)]
        if moment == "checkpoint":
            reached = wait_for(lambda asides=asides: any(os.path.isdir(path) for path in asides), process)
        else:
            reached = wait_for(lambda before=before: lines(parts) > before, process)
            time.sleep(rng.uniform(0, 0.3))
        assert reached, process.communicate()[1]
        process.kill()
        process.communicate(timeout=30)
        killed += process.returncode == -signal.SIGKILL
        arguments = [task, "--resume", "--run-dir", str(parts), "-q"]
    assert killed >= 2
    cli(*arguments, cwd=workspace)
    same_result(parts, whole, metrics)
    assert not list((parts / "checkpoints").glob(".*"))


PRIME = {
    "algorithm.advantage": "prime",
    "algorithm.kl_coef": 0.0,
    "algorithm.value_coef": 1.0,
    "value_model": "null",
    "rollout.n": 4,
    "implicit_prm.lr": 1e-3,
}


@pytest.mark.heavy
def test_the_implicit_reward_model_goes_on_where_it_was(workspace, command, cli, metrics, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cli(*command("ppo", whole, PRIME), cwd=workspace)
    cli(*command("ppo", parts, {**PRIME, "train.steps": 3}), cwd=workspace)
    cli("ppo", "--resume", "--run-dir", str(parts), "-q", "train.steps=6", cwd=workspace)
    same_result(parts, whole, metrics)
    losses = [record["loss/implicit_prm"] for record in metrics(whole)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # it starts as its own reference
    assert abs(losses[-1] - losses[0]) > 1e-4
