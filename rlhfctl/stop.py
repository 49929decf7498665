"""What a signal means to a run: end at once while it loads, keep a checkpoint at the step boundary once it trains."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rlhfctl.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """The signal that asks this rank to stop.

    Until the trainer first asks (it is still loading; there is nothing to keep) a signal ends the run at once;
    from then on it is only noted, and the trainer keeps a checkpoint at the step boundary.
    """

    def __init__(self, inline: bool) -> None:
        self.signum: int | None = None
        self.inline = inline
        self.deferred = False

    def asked(self) -> int | None:
        self.deferred = True
        return self.signum

    def handle(self, signum: int, frame: FrameType | None) -> None:
        signum = signal.SIGTERM if signum == signal.SIGHUP else signum
        if self.signum is not None:
            # A second one: under torchrun the launcher sees to it, and the agent may repeat the first.
            if self.inline:
                os.write(2, b"killed before the step boundary; the last checkpoint is kept\n")
                os._exit(128 + signum)
            return
        self.signum = signum
        if not self.deferred:
            raise Interrupted(signum, "interrupted before the first step; nothing is lost")
        if self.inline:
            name = signal.Signals(signum).name.encode()
            os.write(
                2, b"\n" + name + b": stopping at the step boundary with a checkpoint; once more kills\n"
            )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals over; one that is ignored here (nohup) stays ignored."""
        previous = {}
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                previous[signum] = signal.signal(signum, self.handle)
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(self.try_again, hook)
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def try_again(self, hook: Callable[[Any], object], unraisable: Any) -> None:
        """A signal that arrives inside a destructor or an import's callback cannot end the run from there: python
        would print the exception and go on. It is sent once more a moment later, to arrive in ordinary code."""
        if unraisable.exc_type is not Interrupted:
            hook(unraisable)
            return
        signum, self.signum = self.signum, None
        if signum is not None:
            again = threading.Timer(0.01, os.kill, (os.getpid(), signum))
            again.daemon = True
            again.start()


def exit_code(signum: int) -> int:
    """130 for Ctrl-C, 143 for SIGTERM and a lost terminal."""
    return 130 if signum == signal.SIGINT else 143
