"""DeepSpeed's launcher for real: a hostfile, two processes, and a rank that is killed is the one that is named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

RECIPE = """\
task: sft
name: tiny
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data: {{train: [{{path: {chains}/data/sft.jsonl}}], max_length: 128}}
train: {{steps: 1000, batch_size: 16, tokens_per_microbatch: 256, save_every: 2}}
launch: {{hostfile: {here}/hosts, threads: 1}}
deepspeed: {{zero_stage: 3, persist_below: 0}}
"""


def worker_of(rank: int, run: Path) -> int:
    """The process of a rank, from what it last wrote of itself."""
    return int(json.loads((run / "logs" / "latest" / f"rank{rank}.beat").read_text())["pid"])


def test_a_hostfile_starts_two_processes_and_a_killed_one_is_named(chains: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(chains=chains, here=tmp_path))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rlhfctl", "sft", str(tmp_path / "recipe.yaml"), "--run-dir", str(run)]
    with subprocess.Popen([*command, "-q"], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not (run / "checkpoints" / "step_000002").is_dir():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(worker_of(1, run), signal.SIGKILL)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank:      1 of 2\n" in told
    assert "killed by SIGKILL" in told
    launched = json.loads((run / "launch.json").read_text())
    assert (launched["launcher"], launched["processes_per_node"]) == ("deepspeed", 2)
    assert "deepspeed.launcher.launch" in launched["command"]
    assert (run / "checkpoints" / "step_000002" / "policy.optimizer.safetensors").is_file()
