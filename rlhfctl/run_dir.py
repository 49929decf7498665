"""A run directory: its paths, attempts, status, lock, and the writes that survive a kill at any moment.

Stdlib only: the launcher (no torch) and the workers read and write the same directory through this file.
Everything that must be whole or absent is written aside, flushed to disk and renamed into place.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhfctl.errors import RunFailed, UsageError, is_disk_full

MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step_(\d{6,})")
# What may lie in a directory that no run has used yet: a refused run leaves its report, a lock leaves its file.
UNUSED = {"preflight.json", ".lock"}


def default_for(name: str) -> Path:
    """runs/NAME/YYYYmmdd-HHMMSS, with -2, -3, ... where two runs start in the same second."""
    first = Path("runs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")
    path, number = first, 2
    while path.exists():
        path, number = first.with_name(f"{first.name}-{number}"), number + 1
    return path


class RunDir:
    """One run directory. Nothing is created before `create()`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def preflight(self) -> Path:
        return self.path / "preflight.json"

    @property
    def launch(self) -> Path:
        return self.path / "launch.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def warmup(self) -> Path:
        return self.path / "warmup"

    @property
    def value_model(self) -> Path:
        return self.path / "value_model"

    def round(self, number: int) -> Path:
        """What one round of an iterative run leaves, counted from 1."""
        return self.path / "rounds" / str(number)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def create(self) -> None:
        """Make the directory; UsageError where the path is a file, cannot be made or cannot be written to."""
        if not self.claim() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file: give --run-dir a directory")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UsageError(
                f"cannot write to the run directory {self.path}: it is read-only for this user; make it writable, or "
                "give another --run-dir"
            )

    def claim(self) -> bool:
        """Make the directory, for this process alone; False where something of its name is there already."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            return False
        except OSError as error:
            raise UsageError(
                f"cannot make the run directory {self.path}: {error.strerror}; give another --run-dir"
            ) from None
        return True

    def give_back(self) -> None:
        """Remove the directory, where nothing was written into it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def is_used(self) -> bool:
        """Whether it holds anything a new run would mix with: any entry but a refused run's report."""
        if not self.path.is_dir():
            return self.path.exists()
        return any(entry.name not in UNUSED for entry in self.path.iterdir())

    # Attempts and status

    def next_attempt(self) -> int:
        """Make logs/attempt_N for the next N and point logs/latest at it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        names = (re.fullmatch(r"attempt_(\d+)", entry.name) for entry in self.logs.iterdir())
        number = max((int(name[1]) for name in names if name), default=0) + 1
        self.attempt(number).mkdir()
        link = self.logs / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(f"attempt_{number}")
        os.replace(link, self.logs / "latest")
        return number

    def attempt(self, number: int) -> Path:
        return self.logs / f"attempt_{number}"

    def write_status(
        self,
        state: str,
        step: int | None = None,
        reason: str | None = None,
        exit_code: int | None = None,
        **more: Any,
    ) -> None:
        """Replace status.json at once. state: running | done | failed | interrupted. step None keeps the last."""
        if step is None:
            step = self.read_status().get("step")
        status = {
            "schema": 1,
            "state": state,
            "step": step,
            "reason": reason,
            "exit_code": exit_code,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        # A running step's status is read while the run lives; only what outlives it is worth a flush to disk.
        text = json.dumps(status, indent=1) + "\n"
        try:
            write_text(self.status, text, durable=state != "running")
        except OSError as error:
            if state == "running" or not is_disk_full(error) or not self.status.exists():
                raise
            overwrite(self.status, text)  # how it ended is told on a full disk too

    def read_status(self) -> dict[str, Any]:
        """status.json, or {} where there is none or it is torn."""
        try:
            status = json.loads(self.status.read_text())
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    # Checkpoints

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step, or None."""
        complete = self._complete_checkpoints()
        return complete[-1] if complete else None

    def sound_checkpoint(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest checkpoint that is what was written, and the newer ones that are not, each with its flaw.

        Reads every byte of what it looks at.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._step_directories()):
            wrong = flaw(path)
            if wrong is None:
                return path, damaged
            damaged.append((path, wrong))
        return None, damaged

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint, so that its step can be written again; returns where it is now."""
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        return aside

    def checkpoint_step(self, path: Path) -> int:
        """The step in a checkpoint's name."""
        match = STEP_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is not named step_NNNNNN")
        return int(match[1])

    def commit_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write checkpoints/step_NNNNNN whole or not at all: `write` fills an empty directory beside it.

        A complete checkpoint of the same step is kept as it is: the state of a step is one state.
        Raises RunFailed in one sentence where it cannot be written; earlier checkpoints are untouched.
        """
        target = self.checkpoints / f"step_{step:06d}"
        if is_complete(target):
            return target
        newest = self.newest_checkpoint()
        kept = f"{newest.name} is kept" if newest else "there is no earlier one"
        self._commit(target, write, f"the checkpoint {target.name}", kept)
        return target

    def commit_final(self, write: Callable[[Path], None]) -> Path:
        """Write final/ whole or not at all, replacing an earlier one."""
        newest = self.newest_checkpoint()
        kept = f"checkpoint {newest.name} is kept" if newest else "no checkpoint is kept"
        self._commit(self.final, write, "the final model", kept)
        return self.final

    def checkpoint_up_to(self, step: int) -> Path | None:
        """The newest complete checkpoint of step `step` or before."""
        kept = [path for path in self._complete_checkpoints() if self.checkpoint_step(path) <= step]
        return kept[-1] if kept else None

    def commit_value_model(self, target: Path, write: Callable[[Path], None]) -> Path:
        """Write a value model's directory whole or not at all."""
        self._commit(target, write, "the value model", "the last checkpoint is kept")
        return target

    def commit_phase(self, target: Path, write: Callable[[Path], None]) -> Path:
        """Write a phase's model, which the next phase starts from, whole or not at all."""
        self._commit(target, write, "the phase's model", "its last checkpoint is kept")
        return target

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` complete checkpoints, and any incomplete one."""
        complete = self._complete_checkpoints()
        keeping = set(complete[-keep:])
        for path in self._step_directories():
            if path not in keeping:
                remove_aside(path)

    def _step_directories(self) -> list[Path]:
        if not self.checkpoints.is_dir():
            return []
        paths = [path for path in self.checkpoints.iterdir() if STEP_NAME.fullmatch(path.name)]
        return sorted(paths, key=self.checkpoint_step)

    def _complete_checkpoints(self) -> list[Path]:
        return [path for path in self._step_directories() if is_complete(path)]

    def _commit(self, target: Path, write: Callable[[Path], None], what: str, kept: str) -> None:
        try:
            commit_directory(target, write)
        except Exception as error:
            if not isinstance(error, OSError) and not is_disk_full(error):
                raise
            if is_disk_full(error):
                free = shutil.disk_usage(self.path).free // 2**20
                cause = f"no space left on the disk ({free} MiB free once it was cleaned up)"
                fix = "free some space or lower train.keep_checkpoints"
            else:
                cause = getattr(error, "strerror", None) or str(error)
                fix = "make the directory writable"
            raise RunFailed(
                f"cannot write {what} in {target.parent}: {cause}; {kept}; {fix}, then add --resume"
            ) from error

    # One writer at a time

    def acquire_lock(self, wait: float = 10.0) -> int:
        """Hold this directory for this process until it ends; returns the descriptor, to hand to children.

        Waits for a process that is just dying (a resume right after a kill), then UsageError that names its pid.
        """
        if self._lock is not None:
            return self._lock
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                    os.close(descriptor)
                    raise UsageError(
                        f"process {pid} is still writing {self.path}: stop it first, or give another --run-dir"
                    ) from None
                time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._lock = descriptor
        return descriptor

    def release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


# Whole or absent


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replace a small file at once; durable: also after a power cut."""
    aside = path.with_name(f".{path.name[:40]}.{os.getpid()}")  # of a name of any length
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write or a flush that fails does not say of which file
        raise
    if durable:
        sync_directory(path.parent)


def write_named(path: Path, text: str) -> None:
    """A file that the user named: replaced at once where it is one; a link stays, a device or a pipe is written to."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        regular = True
    if regular:
        write_text(Path(os.path.realpath(path)), text, durable=False)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def overwrite(path: Path, text: str) -> None:
    """In the block that a small file has already: a full disk has room for that."""
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def commit_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory aside through `write`, list its files, sizes and checksums in a manifest, flush all, rename.

    What earlier crashes left beside the target is removed first; on any failure so is what this call wrote.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name.split('_')[0]}*.aside"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside = target.with_name(f".{target.name}.aside")
    try:
        aside.mkdir()
        write(aside)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
        sums = {str(path.relative_to(aside)): checksum(path) for path in files}
        manifest = {"schema": 1, "files": sizes, "crc32": sums}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in [*files, aside / MANIFEST]:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for directory in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
            sync_directory(directory)
        if target.exists():
            remove_aside(target)
        os.rename(aside, target)
        sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def is_complete(path: Path) -> bool:
    """Whether every file of the manifest is there with its size."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def flaw(path: Path) -> str | None:
    """What is wrong with a directory that was committed, in a few words; None: every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sizes, sums = dict(manifest["files"]), dict(manifest.get("crc32", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes of {size}"
            if name in sums and checksum(path / name) != sums[name]:
                return f"{name} is not what was written: its checksum differs"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def remove_aside(path: Path) -> None:
    """Delete a directory through a rename, so that a kill never leaves half of it under its own name."""
    aside = path.with_name(f".{path.name}.old.aside")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(text: str) -> list[str]:
    """The lines of a .jsonl of ours. They end at \\n alone: str.splitlines would also cut at U+2028 and the like, which
    stand in texts as they are."""
    return [line for line in text.split("\n") if line]


def truncate_jsonl(path: Path, step: int) -> None:
    """Keep the whole lines whose "step" is at most `step` (a line without one is kept); drop a torn last line.

    A resume calls it, so that what the lost steps had logged is written once.
    """
    if not path.exists():
        return
    kept, changed = [], False
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            keep = line.endswith(b"\n") and int(row.get("step", 0)) <= step
        except (ValueError, AttributeError, TypeError):
            keep = False
        changed |= not keep
        if keep:
            kept.append(line)
    if changed:
        write_text(path, b"".join(kept).decode(), durable=True)
