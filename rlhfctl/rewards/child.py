"""A Python process of our own that answers one JSON line with one JSON line, within a time limit.

Code that may hang, crash or print (a user's reward function, a computer algebra system) runs there. It is started
fresh, not forked: no threads, device contexts or locks of the trainer come along. A child that misses its time
limit, dies or breaks the protocol is killed with everything it has started, and the next call starts another.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

START_SECONDS = 120.0  # importing torch from a cold disk, on a busy box

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class ChildTimeout(Exception):
    """No answer within the time limit; the child was killed."""


class ChildDied(Exception):
    """The child ended or broke the protocol; the message says how."""


class Child:
    """`module` names a module of rlhfctl with a function `main(argv) -> None` that calls `child_loop.serve`."""

    def __init__(self, module: str, argv: list[str], start_seconds: float = START_SECONDS) -> None:
        self.module, self.argv, self.start_seconds = module, argv, start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Any, timeout: float) -> Any:
        """The answer to one request. Raises ChildTimeout or ChildDied; either way the next call works again.

        The time limit does not run while the child starts: that has `start_seconds` of its own.
        """
        with self._lock:
            try:
                process = self._running()
                # default: a table's dates and decimals reach a reward function as text
                line = json.dumps(request, default=str).encode() + b"\n"
                return self._exchange(process, line, timeout)
            except BaseException:
                # Whatever went wrong (an interrupt in the middle of a line, too), this child's answers no longer
                # belong to our questions.
                self._kill()
                raise

    def start(self) -> None:
        """Starts the child now, so that what it cannot import is known before the first request. Raises as ask."""
        with self._lock:
            try:
                self._running()
            except BaseException:
                self._kill()
                raise

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        code = (
            f"import sys; sys.path.insert(0, {PACKAGE_ROOT!r}); from {self.module} import main; "
            f"sys.path.remove({PACKAGE_ROOT!r}); main(sys.argv[1:])"
        )
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", code, *self.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the trainer, which finishes its step; and killpg reaches all
        )
        try:
            ready = self._exchange(process, b"", self.start_seconds)
        except ChildTimeout:
            raise ChildTimeout(f"was not ready after {self.start_seconds:g} s") from None
        if ready != "ready":
            raise ChildDied(str(ready))
        return process

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes, timeout: float) -> Any:
        """Writes while it reads, so that neither side can block the other for longer than the limit."""
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + timeout
        unsent, received = memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if unsent:
                os.set_blocking(process.stdin.fileno(), False)
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while not received.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ChildTimeout(f"no answer after {timeout:g} s")
                for key, _ in selector.select(left):
                    if key.fileobj is process.stdin:
                        try:
                            unsent = unsent[os.write(process.stdin.fileno(), unsent) :]
                        except BrokenPipeError:
                            raise ChildDied(_how_it_ended(process)) from None
                        if not unsent:
                            selector.unregister(process.stdin)
                    elif chunk := os.read(process.stdout.fileno(), 1 << 16):
                        received += chunk
                    else:
                        raise ChildDied(_how_it_ended(process))
        try:
            return json.loads(received)
        except ValueError:
            raise ChildDied("wrote something that is not its answer") from None

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
