"""Real trainings through launch.start: how each way of ending is told, and that nothing is lost by it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.failure import Failure, write_failure
from rlhfctl.launch.hang import Hang
from rlhfctl.launch.plan import Plan
from rlhfctl.launch.process import AgentResult
from rlhfctl.launch.run import leader_started, torchrun_result
from rlhfctl.recipe.load import dump, load_recipe
from rlhfctl.run_dir import RunDir, is_complete
from rlhfctl.worker import left_by_a_restart

DRIVER = """
import json, sys
from dataclasses import asdict
from rlhfctl.launch import start
from rlhfctl.recipe.load import read_resolved
from rlhfctl.run_dir import RunDir
run = RunDir(sys.argv[1])
result = start(read_resolved(run.recipe), run, "--resume" in sys.argv, False)
print(json.dumps(asdict(result)))
"""
TIMED = ("seconds/", "tokens_per_second", "memory/")  # of the clock and the process, not of the training


def make_run(path: Path, chains: Path, *overrides: str) -> RunDir:
    """An unstarted run of a tiny sft: its directory and its recipe."""
    keys = {
        "policy.from_config": f"{chains}/model",
        "policy.tokenizer": f"{chains}/model",
        "data.train": f"[{{path: {chains}/data/sft.jsonl}}]",
        "data.eval": "[]",
        "reward": "null",
        "rollout": "null",
        "train.steps": "6",
        "train.save_every": "2",
        "train.log_every": "1",
        "train.batch_size": "16",
    }
    keys |= dict(override.split("=", 1) for override in overrides)
    run = RunDir(path)
    run.create()
    run.recipe.write_text(
        dump(load_recipe("quickstart/sft", ["=".join(pair) for pair in keys.items()]).recipe)
    )
    return run


class Started:
    """A driver process over a run directory."""

    def __init__(self, run: RunDir, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(run.path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def end(self) -> tuple[dict[str, Any], str]:
        """The result and stderr."""
        stdout, stderr = self.process.communicate(timeout=240)
        assert "Traceback" not in stderr, stderr
        return json.loads(stdout), stderr

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(row["step"] >= step for row in metrics(self.run)))


def metrics(run: RunDir) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl without what depends on the clock."""
    if not run.metrics.exists():
        return []
    lines = run.metrics.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def test_inline_runs_to_the_end_and_keeps_stdout_clean(tmp_path: Path, chains: Path) -> None:
    run = make_run(tmp_path / "run", chains)
    result, stderr = Started(run).end()
    assert (result["state"], result["exit_code"], result["step"]) == ("done", 0, 6)
    assert "step 6/6" in stderr
    assert "shards" not in stderr
    assert run.read_status()["state"] == "done"
    assert [row["step"] for row in metrics(run)] == list(range(1, 7))
    assert is_complete(run.final)
    assert json.loads(run.launch.read_text())["launcher"] == "inline"
    assert "step 6/6" in (run.logs / "latest" / "rank0.log").read_text()


@pytest.mark.parametrize("name", ["metrics", "samples", "quarantine"])
def test_a_restart_is_told_by_whatever_was_written_first(name: str, tmp_path: Path) -> None:
    """With a log line every ten steps, samples come before metrics; a failed reward comes before both."""
    run = RunDir(tmp_path / "run")
    run.create()
    run.write_status("running", attempt=1)
    assert not left_by_a_restart(run, inline=False)
    (tmp_path / "run" / f"{name}.jsonl").write_text('{"step": 1}\n')
    assert left_by_a_restart(run, inline=False)
    assert not left_by_a_restart(run, inline=True)


def test_ctrl_c_keeps_a_checkpoint_and_resume_is_exact(tmp_path: Path, chains: Path) -> None:
    whole = make_run(tmp_path / "whole", chains, "train.steps=40", "train.save_every=0")
    Started(whole).end()
    run = make_run(tmp_path / "run", chains, "train.steps=40", "train.save_every=0")
    started = Started(run)
    started.wait_for_step(5)
    started.process.send_signal(signal.SIGINT)
    result, stderr = started.end()
    assert (result["state"], result["exit_code"]) == ("interrupted", 130)
    assert result["report"] == [result["reason"]]
    assert "SIGINT: stopping at the step boundary" in stderr
    newest = run.newest_checkpoint()
    assert newest is not None
    stopped_at = run.checkpoint_step(newest)
    assert 5 <= stopped_at == result["step"] == metrics(run)[-1]["step"]
    assert not run.final.exists()
    resumed, _ = Started(run, "--resume").end()
    assert (resumed["state"], resumed["step"]) == ("done", 40)
    assert metrics(run) == metrics(whole)
    assert (run.final / "model.safetensors").read_bytes() == (whole.final / "model.safetensors").read_bytes()
    assert (run.logs / "attempt_2" / "rank0.log").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_at_once(signum: int, tmp_path: Path, chains: Path) -> None:
    run = make_run(tmp_path / "run", chains)
    started = Started(run)
    started.wait_until(run.launch.exists)  # the worker imports torch from here on
    started.process.send_signal(signum)
    result, _ = started.end()
    assert (result["state"], result["exit_code"]) == ("interrupted", 128 + signum)
    assert run.read_status()["state"] == "interrupted"
    assert metrics(run) == []


def test_a_second_signal_does_not_wait_for_the_step(tmp_path: Path, chains: Path) -> None:
    run = make_run(tmp_path / "run", chains, "train.steps=100000", "train.save_every=0")
    started = Started(run)
    started.wait_for_step(2)
    started.process.send_signal(signal.SIGSTOP)  # both arrive in one step
    started.process.send_signal(signal.SIGTERM)
    started.process.send_signal(signal.SIGINT)
    started.process.send_signal(signal.SIGCONT)
    started.process.wait(timeout=60)
    assert started.process.returncode in (130, 143)
    started.process.communicate()


def test_a_known_failure_is_a_sentence_with_its_exit_code(tmp_path: Path, chains: Path) -> None:
    run = make_run(tmp_path / "run", chains, f"data.train=[{{path: {tmp_path}/absent.jsonl}}]")
    result, _ = Started(run).end()
    assert (result["state"], result["exit_code"]) == ("failed", 5)
    assert "absent.jsonl: no such data file" in result["reason"]
    assert [line.split(":")[0] for line in result["report"]] == ["rank", "exception", "log", "resume"]
    assert "Traceback" in (run.logs / "latest" / "rank0.log").read_text()


def test_an_unknown_failure_is_four_lines(tmp_path: Path, chains: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for file in (chains / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "no-such-architecture"}))
    run = make_run(tmp_path / "run", chains, f"policy.from_config={broken}")
    result, _ = Started(run).end()
    assert (result["state"], result["exit_code"]) == ("failed", 1)
    rank, exception, log, resume = result["report"]
    assert rank == "rank:      0 of 1"
    assert "no-such-architecture" in exception
    assert Path(log.split()[1]).read_text().count("Traceback") >= 1
    assert resume == f"resume:    rlhfctl sft {run.recipe} --run-dir {run.path} --resume"


def test_torchrun_keeps_exit_codes_and_names_the_rank(tmp_path: Path, chains: Path) -> None:
    run = make_run(tmp_path / "run", chains, "data.max_length=3", "launch.nproc_per_node=2")
    result, _ = Started(run).end()
    assert (result["state"], result["exit_code"]) == ("failed", 5)
    assert "no row of" in result["reason"]
    assert result["report"][0] in ("rank:      0 of 2", "rank:      1 of 2")
    assert run.read_status()["exit_code"] == 5


@pytest.mark.heavy
def test_ctrl_c_under_torchrun_keeps_a_checkpoint(tmp_path: Path, chains: Path) -> None:
    run = make_run(
        tmp_path / "run", chains, "launch.nproc_per_node=2", "train.steps=100000", "train.save_every=0"
    )
    started = Started(run)
    started.wait_for_step(3)
    started.process.send_signal(signal.SIGTERM)
    result, _ = started.end()
    assert (result["state"], result["exit_code"]) == ("interrupted", 143)
    newest = run.newest_checkpoint()
    assert newest is not None
    assert run.checkpoint_step(newest) == result["step"] >= 3


@pytest.mark.heavy
def test_a_node_that_stays_alone(tmp_path: Path, chains: Path) -> None:
    launch = ["launch.nnodes=2", "launch.rdzv_endpoint=127.0.0.1:29478", "launch.timeout=4"]
    run = make_run(tmp_path / "run", chains, *launch)
    result, _ = Started(run).end()
    assert (result["state"], result["exit_code"]) == ("failed", 1)
    assert "the other nodes did not come" in result["reason"]


def test_ctrl_c_while_waiting_for_the_other_nodes(tmp_path: Path, chains: Path) -> None:
    run = make_run(tmp_path / "run", chains, "launch.nnodes=2", "launch.rdzv_endpoint=127.0.0.1:29479")
    started = Started(run)
    started.wait_until((run.attempt(1) / "torchrun.log").exists)
    started.process.send_signal(signal.SIGINT)
    result, _ = started.end()
    assert (result["state"], result["exit_code"]) == ("interrupted", 130)


def test_a_follower_waits_for_its_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDir(tmp_path)
    monkeypatch.setattr("rlhfctl.launch.run.MEETING_SECONDS", 0.3)
    assert not leader_started(directory, [])
    assert leader_started(directory, [signal.SIGTERM])
    directory.write_status("failed", reason="an attempt before", exit_code=1, attempt=1)
    assert not leader_started(directory, [])
    monkeypatch.setattr("rlhfctl.launch.run.MEETING_SECONDS", 30.0)
    later = threading.Timer(0.5, lambda: directory.write_status("running", attempt=2))
    later.start()
    assert leader_started(directory, [])
    assert directory.read_status()["attempt"] == 2


HANGS = Hang("rank 1 hangs in update of step 2", 0, frozenset({102}))


@pytest.mark.parametrize(
    ("death", "hang", "rank", "words"),
    [
        ((102, -9), None, 1, "the worker was killed by SIGKILL"),
        ((102, -9), HANGS, 1, "rank 1 hangs in update"),
        ((101, 1), None, 0, "RuntimeError: Connection closed by peer"),
        ((103, -9), None, 0, "RuntimeError: Connection closed by peer"),  # no rank of ours
        (None, None, 0, "RuntimeError: Connection closed by peer"),
    ],
)
def test_whose_death_it_was_under_deepspeed_s_launcher(
    tmp_path: Path, chains: Path, death: tuple[int, int] | None, hang: Hang | None, rank: int, words: str
) -> None:
    """Rank 0 told that it had lost its peer, and that launcher told rank 0's exit code."""
    run = make_run(tmp_path / "run", chains)
    attempt = run.attempt(1)
    attempt.mkdir(parents=True)
    beat = {"node": "", "step": 2, "phase": "update", "waiting": None, "count": 3}
    for number, pid in enumerate((101, 102)):
        (attempt / f"rank{number}.beat").write_text(json.dumps({"rank": number, "pid": pid, **beat}))
    lost = "RuntimeError: Connection closed by peer"
    write_failure(attempt, Failure(0, 2, lost, 1, str(attempt / "rank0.log"), 1.0))
    (attempt / "torchrun.log").write_text("Process 101 exits with return code = 1\n")
    plan = Plan("deepspeed", "cpu", 2, 1, 1, 0, 60.0, {})
    result = torchrun_result(
        load_recipe(str(run.recipe)).recipe, plan, run, 1, AgentResult(1, None, hang, death), False
    )
    assert (result.state, result.exit_code) == ("failed", 1)
    assert result.report[0] == f"rank:      {rank} of 2"
    assert words in result.report[1]
