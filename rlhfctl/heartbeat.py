"""Where a rank is: one short record in logs/attempt_N/rankK.beat, written over at every change.

The launcher reads these files and can tell a rank that waits for the others from the one they wait for
(launch/hang.py).
One process is one rank, as with torch's process group: the record is the process's own.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZE = 256  # bytes; written at once, so that a reader sees one record whole


class Heartbeat:
    """Silent until `open`: a trainer outside a launched run writes none."""

    def __init__(self) -> None:
        self.file: int | None = None
        self.record: dict[str, Any] = {}
        self.count = 0
        self.what: str | None = None  # the wait under way; one may lie inside another

    def open(self, path: Path, rank: int) -> None:
        self.close()
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        node = os.environ.get("RLHFCTL_NODE", "")
        self.record = {"rank": rank, "pid": os.getpid(), "node": node, "step": 0, "phase": "loading"}
        self._write(None)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def at(self, phase: str, step: int | None = None) -> None:
        """This rank enters a phase; step: the one under way, 1-based, None: as before."""
        self.record["phase"] = phase
        if step is not None:
            self.record["step"] = step
        self._write(None)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside: this rank waits for the others, in the collective `what`."""
        if self.file is None:
            yield
            return
        before, self.what = self.what, what
        self._write(what)
        try:
            yield
        finally:
            self.what = before
            self._write(before)

    def _write(self, waiting: str | None) -> None:
        if self.file is None:
            return
        self.count += 1
        text = json.dumps({**self.record, "waiting": waiting, "count": self.count})
        os.pwrite(self.file, text.encode()[:SIZE].ljust(SIZE), 0)


heartbeat = Heartbeat()
