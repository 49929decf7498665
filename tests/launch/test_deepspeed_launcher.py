"""DeepSpeed's launcher for real, from a hostfile: one host and two; a rank that is killed is the one that is named."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfctl.launch.same_run import compare_runs
from rlhfctl.run_dir import RunDir

pytestmark = pytest.mark.heavy
Login = Callable[[int, str], "subprocess.Popen[str]"]

RECIPE = """\
task: sft
name: tiny
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data: {{train: [{{path: {chains}/data/sft.jsonl}}], max_length: 64}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{steps: 1000, batch_size: 16, tokens_per_microbatch: 256, save_every: 2}}
launch: {{hostfile: {here}/{hosts}, threads: 1, timeout: 60}}
deepspeed: {{zero_stage: 3, persist_below: 0}}
"""
HOSTS = {"one": "localhost slots=2\n", "two": "10.211.77.1 slots=1\n10.211.77.2 slots=1\n"}


@pytest.fixture
def recipes(chains: Path, tmp_path: Path) -> Path:
    """one.yaml and two.yaml: the same on one host and on two."""
    pytest.importorskip("deepspeed")
    for name, text in HOSTS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(chains=chains, here=tmp_path, hosts=name))
    return tmp_path


def worker_of(rank: int, run: Path) -> int:
    """The process of a rank, from what it last wrote of itself."""
    return int(json.loads((run / "logs" / "latest" / f"rank{rank}.beat").read_text())["pid"])


def test_a_killed_rank_is_named_and_the_resumed_run_is_that_of_two_hosts(recipes: Path, login: Login) -> None:
    """Two processes on one host, one killed by kill -9, and resumed: bit for bit what two hosts train unharmed."""
    run = recipes / "run"
    command = [sys.executable, "-m", "rlhfctl", "sft", "--run-dir", str(run), "-q"]
    with subprocess.Popen(
        [*command, str(recipes / "one.yaml")], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 240
        while not (run / "checkpoints" / "step_000002").is_dir():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(worker_of(1, run), signal.SIGKILL)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank:      1 of 2\n" in told
    assert "killed by SIGKILL" in told
    launched = json.loads((run / "launch.json").read_text())
    assert (launched["launcher"], launched["processes_per_node"]) == ("deepspeed", 2)
    assert "deepspeed.launcher.launch" in launched["command"]

    newest = RunDir(run).newest_checkpoint()
    assert newest is not None
    steps = f"train.steps={RunDir(run).checkpoint_step(newest) + 2}"
    done = subprocess.run([*command, "--resume", steps], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr

    line = f"rlhfctl sft {recipes}/two.yaml --run-dir {recipes}/whole -q {steps}"
    # The host that leads comes last: it must not take the other's logs for an earlier run.
    hosts = []
    for host in (1, 0):
        hosts.append(login(host, line))
        time.sleep(3)
    said = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    found = compare_runs(RunDir(recipes / "whole"), RunDir(run))
    assert [each.where for each in found if each.difference is not None] == []
    launched = json.loads((recipes / "whole" / "launch.json").read_text())
    assert (launched["launcher"], launched["processes_per_node"], launched["nnodes"]) == ("deepspeed", 1, 2)
