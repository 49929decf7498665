"""launch.json, the failure files and the four lines."""

import json
import os
import subprocess
from pathlib import Path

from rlhfctl.failure import Failure, first_failure, report_lines, write_failure
from rlhfctl.launch.plan import make_plan
from rlhfctl.launch.record import changes_since, git_state, read_launch, recorded_environment, write_launch
from rlhfctl.preflight.devices import this_machine
from rlhfctl.recipe.sections import Launch
from rlhfctl.run_dir import RunDir


def test_launch_json_holds_what_is_needed_and_no_secret(tmp_path: Path, monkeypatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "RLHFCTL_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_SECRET"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = RunDir(tmp_path)
    assert run.next_attempt() == 1
    plan = make_plan(Launch(), this_machine(), os.environ)
    write_launch(run, plan, this_machine(), 1, ["python", "x"], {"f.jsonl": "ab"})
    text = run.launch.read_text()
    record = json.loads(text)
    assert "hunter2" not in text
    assert record["env"]["CUDA_VISIBLE_DEVICES"] == ""
    assert record["env"]["OMP_NUM_THREADS"] == str(plan.threads)
    assert record["versions"]["torch"].startswith("2.")
    assert (record["command"], record["launcher"], record["attempt"]) == (["python", "x"], "inline", 1)
    assert (run.attempt(1) / "launch.json").read_text() == text


def test_changes_that_move_the_numbers_are_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.next_attempt()
    before = make_plan(Launch(threads=2), this_machine(), {})
    write_launch(run, before, this_machine(), 1, [], {})
    assert changes_since(read_launch(run), before) == []
    after = make_plan(Launch(threads=1, nproc_per_node=2), this_machine(), {})
    assert changes_since(read_launch(run), after) == ["threads per process 2 -> 1", "processes 1 -> 2"]
    assert changes_since({}, after) == []


def test_only_listed_variables_are_recorded() -> None:
    environ = {
        "OMP_NUM_THREADS": "1",
        "HOME": "/h",
        "OPENAI_API_KEY": "k",
        "NCCL_DEBUG": "INFO",
        "TORCH_TOKEN": "t",
    }
    assert recorded_environment(environ) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}


def test_git_state_of_a_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "a").write_text("2")
    changed = git_state(tmp_path)
    assert changed is not None
    assert changed["dirty"] is True


def failure(rank: int, time: float, exception: str) -> Failure:
    return Failure(rank, 2, exception, 1, f"logs/rank{rank}.log", time, traceback="Traceback\n  boom\n")


def test_the_rank_that_failed_first_is_told(tmp_path: Path) -> None:
    assert first_failure(tmp_path) is None
    write_failure(tmp_path, failure(0, 100.25, "RuntimeError: Connection closed by peer"))
    write_failure(tmp_path, failure(1, 100.20, "ValueError: boom"))
    (tmp_path / "rank7.error.json").write_text('{"rank": 7')  # torn by a kill
    first = first_failure(tmp_path)
    assert first is not None
    assert first.exception == "ValueError: boom"
    run = RunDir("runs/my run/1")
    lines = report_lines(first, "ppo", run, with_traceback=False)
    assert lines == [
        "rank:      1 of 2",
        "exception: ValueError: boom",
        "log:       logs/rank1.log",
        "resume:    rlhfctl ppo 'runs/my run/1/recipe.yaml' --run-dir 'runs/my run/1' --resume",
    ]
    assert report_lines(first, "ppo", run, with_traceback=True)[:2] == ["Traceback", "  boom"]
