"""A disk without a free block: one sentence that names the file, and what was whole stays and goes on."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhfctl.cli.main import disk_full
from rlhfctl.errors import Unable, is_disk_full
from rlhfctl.evaluation.results import write_lines
from rlhfctl.launch.same_run import compare_runs
from rlhfctl.run_dir import RunDir
from rlhfctl.stop import StopRequest
from rlhfctl.templates.hub import hub_failure
from rlhfctl.worker import explain

Train = Callable[..., RunDir]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> None:
    """To the last block."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def test_a_run_that_cannot_log_goes_on_as_if_nothing_had_been(train: Train, disk: Path) -> None:
    class Lines(list[str]):
        def append(self, line: str) -> None:
            if line.startswith("step 21/40"):
                fill(disk)

    longer = ("train.steps=40", "train.save_every=20")  # metrics.jsonl outgrows the blocks that it has
    whole = train("sft", "whole", *longer)
    with pytest.raises(OSError, match="No space left") as raised:
        train("sft", str(disk / "run"), *longer, said=Lines())
    run = RunDir(disk / "run")
    told = explain(raised.value, StopRequest(inline=True))
    assert told is not None
    assert told.message.startswith(f"the disk is full ([Errno 28] No space left on device: '{run.path}/")
    assert told.message.endswith("'): free some space, then add --resume")
    run.write_status("failed", reason=told.message, exit_code=1)
    assert (run.read_status()["state"], run.read_status()["reason"]) == ("failed", told.message)
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest.name == "step_000020"
    (disk / "filler").unlink()
    train("sft", str(disk / "run"), *longer, resume=True)
    assert [each.where for each in compare_runs(whole, run) if each.difference is not None] == []


def test_what_was_asked_for_is_whole_or_as_it_was(disk: Path) -> None:
    path = disk / "trajectories.jsonl"
    write_lines(path, [{"id": "a"}])
    fill(disk)
    with pytest.raises(Unable) as told:
        write_lines(path, [{"id": "b", "text": "x" * 100_000}])
    assert told.value.message == (
        f"cannot write {path}: the disk is full; free some space, or name a place on another disk"
    )
    assert path.read_text() == '{"id": "a"}\n'
    assert sorted(each.name for each in disk.iterdir()) == ["filler", "trajectories.jsonl"]


def test_the_cache_of_the_hub(disk: Path) -> None:
    fill(disk)
    with pytest.raises(OSError, match="No space") as raised:
        (disk / "blob").write_bytes(b"x" * 10_000)
    wrapped = RuntimeError("an error occurred while generating the dataset")
    wrapped.__cause__ = raised.value
    assert hub_failure(wrapped, "a/b")[0] == "the disk of its cache is full"
    assert not is_disk_full(wrapped)
    assert disk_full(raised.value) is not None
    assert disk_full(OSError(13, "Permission denied")) is None
