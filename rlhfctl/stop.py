"""What a signal means to a run: end at once while it loads, keep a checkpoint at the step boundary once it trains."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

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
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def exit_code(signum: int) -> int:
    """130 for Ctrl-C, 143 for SIGTERM and a lost terminal."""
    return 130 if signum == signal.SIGINT else 143
