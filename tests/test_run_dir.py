"""The run directory: attempts, status, lock, and directories that are whole or absent."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhfctl.errors import RunFailed, UsageError
from rlhfctl.run_dir import RunDir, default_for, is_complete, truncate_jsonl


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def fill(size: int):
    def write(path: Path) -> None:
        (path / "sub").mkdir()
        (path / "weights.bin").write_bytes(b"x" * size)
        (path / "sub" / "state.json").write_text("{}")

    return write


def test_a_refused_run_leaves_the_directory_unused(run: RunDir) -> None:
    assert not run.is_used()
    run.preflight.write_text("{}")
    run.acquire_lock()
    assert not run.is_used()
    run.write_status("running", step=0)
    assert run.is_used()


def test_a_file_or_a_missing_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    assert RunDir(path).is_used()
    with pytest.raises(UsageError, match="is a file"):
        RunDir(path).create()
    assert not RunDir(tmp_path / "absent").is_used()


def test_a_directory_that_is_read_only(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.create()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run.path and real(path, mode))
    with pytest.raises(UsageError, match="cannot write to the run directory"):
        run.create()


def test_default_directories_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        paths.append(default_for("toy"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 3
    assert paths[0].parent == Path("runs/toy")


def test_a_directory_is_claimed_once(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "new/run"), RunDir(tmp_path / "new/run")
    assert (first.claim(), second.claim()) == (True, False)
    first.give_back()
    assert second.claim()
    (tmp_path / "new/run/metrics.jsonl").write_text("")
    second.give_back()  # something was written: it stays
    assert second.path.is_dir()
    assert not first.claim()


def test_attempts_count_up_and_latest_follows(run: RunDir) -> None:
    assert [run.next_attempt() for _ in range(11)] == list(range(1, 12))
    assert (run.logs / "latest").resolve() == run.attempt(11).resolve()


def test_status_keeps_the_step_and_forgets_the_reason(run: RunDir) -> None:
    run.write_status("running", step=7, attempt=1)
    run.write_status("failed", reason="boom", exit_code=1)
    assert run.read_status()["step"] == 7
    assert run.read_status()["exit_code"] == 1
    run.write_status("running", step=8)
    status = run.read_status()
    assert (status["state"], status["step"], status["reason"], status["exit_code"]) == (
        "running",
        8,
        None,
        None,
    )
    run.status.write_text('{"state": "runn')
    assert run.read_status() == {}


def test_checkpoints_newest_complete(run: RunDir) -> None:
    assert run.newest_checkpoint() is None
    for step in (5, 10, 1_000_000):
        run.commit_checkpoint(step, fill(100 + step % 7))
    newest = run.newest_checkpoint()
    assert newest is not None
    assert (newest.name, run.checkpoint_step(newest)) == ("step_1000000", 1_000_000)
    (newest / "weights.bin").write_bytes(b"short")  # a size that the manifest does not list
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest.name == "step_000010"
    (newest / "manifest.json").unlink()
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest.name == "step_000005"


def test_a_checkpoint_of_the_same_step_is_written_once(run: RunDir) -> None:
    path = run.commit_checkpoint(3, fill(10))
    inode = path.stat().st_ino

    def never(_: Path) -> None:
        raise AssertionError("written twice")

    assert run.commit_checkpoint(3, never) == path
    assert path.stat().st_ino == inode
    (path / "weights.bin").unlink()  # incomplete: written again
    run.commit_checkpoint(3, fill(11))
    assert (path / "weights.bin").stat().st_size == 11


def test_prune_keeps_the_newest_complete_ones(run: RunDir) -> None:
    for step in (1, 2, 3, 4):
        run.commit_checkpoint(step, fill(step))
    (run.checkpoints / "step_000003" / "weights.bin").unlink()
    run.prune_checkpoints(2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000002", "step_000004"]


def test_final_is_replaced(run: RunDir) -> None:
    run.commit_final(fill(1))
    run.commit_final(fill(2))
    assert (run.final / "weights.bin").stat().st_size == 2
    assert is_complete(run.final)
    assert sorted(path.name for path in run.path.iterdir()) == ["final"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError(
            "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/7"
        ),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(run: RunDir, error: Exception) -> None:
    run.commit_checkpoint(5, fill(10))

    def full(path: Path) -> None:
        (path / "weights.bin").write_bytes(b"x" * 1000)
        raise error

    with pytest.raises(RunFailed) as caught:
        run.commit_checkpoint(10, full)
    assert "no space left on the disk" in caught.value.message
    assert "step_000005 is kept" in caught.value.message
    assert "\n" not in caught.value.message
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000005"]
    with pytest.raises(RunFailed, match="checkpoint step_000005 is kept"):
        run.commit_final(full)
    assert not run.final.exists()


def test_a_bug_while_writing_stays_a_bug_and_leaves_nothing(run: RunDir) -> None:
    def wrong(path: Path) -> None:
        (path / "x").write_text("x")
        raise KeyError("optimizer")

    with pytest.raises(KeyError):
        run.commit_checkpoint(1, wrong)
    assert list(run.checkpoints.iterdir()) == []


KILLED_WRITER = """
import sys, time
from pathlib import Path
from rlhfctl.run_dir import RunDir
run = RunDir(sys.argv[1])
def write(path):
    for number in range(200):
        (path / f"part{number}").write_bytes(b"x" * 20000)
step = 1
while True:
    run.commit_checkpoint(step, write)
    run.prune_checkpoints(2)
    run.write_status("running", step=step)
    print(step, flush=True)
    step += 1
"""


def test_kill_9_at_random_moments_leaves_only_whole_checkpoints(run: RunDir) -> None:
    seen = 0
    for delay in (0.0, 0.013, 0.041, 0.002, 0.027, 0.008):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(run.path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        assert process.stdout.readline() == "2\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        newest = run.newest_checkpoint()
        assert newest is not None
        assert len(list(newest.glob("part*"))) == 200
        assert all(part.stat().st_size == 20000 for part in newest.glob("part*"))
        # The status is whole and at most one step behind the checkpoint it was written after.
        assert run.read_status()["step"] in (run.checkpoint_step(newest), run.checkpoint_step(newest) - 1)
        seen += 1
        for path in list(run.checkpoints.glob("step_*")):
            for part in path.iterdir():
                part.unlink()
            path.rmdir()
        run.status.unlink()
    assert seen == 6


HOLDER = """
import sys, time
from rlhfctl.run_dir import RunDir
RunDir(sys.argv[1]).acquire_lock()
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_never_write_one_run(run: RunDir) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {process.pid} is still writing"):
            run.acquire_lock(wait=0.2)
        os.kill(process.pid, signal.SIGKILL)
        run.acquire_lock(wait=10.0)  # a dying writer is waited for
        assert (run.path / ".lock").read_text() == str(os.getpid())
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    run.release_lock()


def test_truncate_keeps_whole_lines_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_jsonl(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step, "loss": 1e-7 * step}) + "\n" for step in range(1, 6)]
    path.write_text('{"note": "no step"}\n' + "".join(lines) + '{"step": 2, "lo')
    truncate_jsonl(path, 3)
    assert path.read_text() == '{"note": "no step"}\n' + "".join(lines[:3])
    stamp = path.stat().st_mtime_ns
    truncate_jsonl(path, 3)
    assert path.stat().st_mtime_ns == stamp
