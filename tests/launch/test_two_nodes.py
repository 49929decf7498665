"""Two nodes as two network namespaces of this machine: the same command on both, one run directory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhfctl.run_dir import RunDir

pytestmark = pytest.mark.heavy
ENDPOINT = "10.211.77.1:29477"


def command(chains: Path, run_dir: Path, *overrides: str) -> list[str]:
    keys = [
        f"policy.from_config={chains}/model",
        f"policy.tokenizer={chains}/model",
        f"data.train=[{{path: {chains}/data/sft.jsonl}}]",
        "data.eval=[]",
        "reward=null",
        "rollout=null",
        "train.save_every=2",
        "train.log_every=1",
        "train.batch_size=16",
        "launch.threads=1",
    ]
    return [
        sys.executable,
        "-m",
        "rlhfctl",
        "sft",
        "quickstart/sft",
        *keys,
        *overrides,
        "--run-dir",
        str(run_dir),
    ]


def on(node: str, argv: list[str]) -> "subprocess.Popen[str]":
    argv = ["ip", "netns", "exec", node, *argv]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(run: RunDir) -> list[float]:
    lines = run.metrics.read_text().splitlines(keepends=True) if run.metrics.exists() else []
    return [json.loads(line)["loss/sft"] for line in lines if line.endswith("\n")]


def test_two_nodes_give_the_losses_of_one(nodes: tuple[str, str], chains: Path, tmp_path: Path) -> None:
    one = RunDir(tmp_path / "one")
    assert subprocess.run(command(chains, one.path, "train.steps=6"), capture_output=True).returncode == 0
    both = RunDir(tmp_path / "both")
    # The follower comes first: it finds no directory, and the leader must not take its logs for an earlier run. Its
    # address comes first too, so that torchrun gives it rank 0.
    keys = ["train.steps=6", "launch.nnodes=2", "launch.rdzv_endpoint=10.211.77.2:29477"]
    follower = on(nodes[0], command(chains, both.path, *keys))
    time.sleep(3)
    leader = on(nodes[1], command(chains, both.path, *keys))
    told, errors = leader.communicate(timeout=240)
    assert leader.returncode == 0, errors
    assert told.strip() == str(both.path)
    assert "step 6/6" in errors
    _, errors = follower.communicate(timeout=60)
    assert follower.returncode == 0, errors
    assert both.read_status()["state"] == "done"
    assert losses(both) == pytest.approx(losses(one), abs=1e-6)
    assert {path.name for path in both.attempt(1).glob("rank*.log")} == {"rank0.log", "rank1.log"}


def wait_for(run: RunDir, processes: "list[subprocess.Popen[str]]", steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(losses(run)) < steps:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lost_worker_a_signal_and_a_cut_cable(nodes: tuple[str, str], chains: Path, tmp_path: Path) -> None:
    """A worker of the second node is killed: all start again. Both get a signal: one checkpoint. The cable is cut:
    both end in bounded time and name the other node."""
    run = RunDir(tmp_path / "run")
    keys = ["train.steps=100000", "launch.nnodes=2", f"launch.rdzv_endpoint={ENDPOINT}"]
    keys += ["launch.max_restarts=1", "launch.timeout=20"]
    processes = [on(node, command(chains, run.path, *keys)) for node in nodes]
    wait_for(run, processes, 4)
    beat = json.loads((run.logs / "latest/rank1.beat").read_text())
    os.kill(beat["pid"], signal.SIGKILL)
    while json.loads((run.logs / "latest/rank1.beat").read_text())["pid"] == beat["pid"]:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.1)
    wait_for(run, processes, len(losses(run)) + 3)
    assert "resuming from step_" in (run.logs / "latest/rank0.log").read_text()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], ends
    newest = run.newest_checkpoint()
    assert newest is not None
    kept = run.checkpoint_step(newest)
    assert kept == len(losses(run))
    assert run.read_status()["state"] == "interrupted"

    again = [sys.executable, "-m", "rlhfctl", "sft", "--resume", "--run-dir", str(run.path)]
    processes = [on(node, [*again, "launch.timeout=8"]) for node in nodes]
    wait_for(run, processes, kept + 3)
    cut_cable = ["ip", "-n", nodes[1], "link", "set", f"v{os.getpid()}b", "down"]
    assert subprocess.run(cut_cable).returncode == 0
    cut = time.monotonic()
    ends = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], ends
    assert time.monotonic() - cut < 8 + 60
    assert "for rank 1 on node 10.211.77.2, more than launch.timeout" in ends[0]
    assert "the network between the nodes is cut, or that node is gone" in ends[0]
    assert "for rank 0 on node 10.211.77.1" in ends[1]
    assert all("Traceback" not in end for end in ends)
    assert run.read_status()["state"] == "failed"
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
