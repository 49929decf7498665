"""A process between a run and a server that it started: the server ends when the run does, however that happens.

    python -m rlhfctl.rollout.guardian ARGV...

stdin is a pipe from the run: its end is the order to stop, given by closing it or by dying; SIGTERM is the same. The
server gets SIGTERM, and what it has started gets it when it is gone or GRACE seconds are over: its helpers give back
shared memory then. What is left LAST seconds later is killed.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE = 10.0
LAST = 3.0
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=die_with_guardian)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: end(child))
    while child.poll() is None:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 64):
            end(child)
    sweep()


def end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    ends = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < ends:
        time.sleep(0.05)
    sweep()


def sweep() -> None:
    """End this session, this process included."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    ends = time.monotonic() + LAST
    while others() and time.monotonic() < ends:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def others() -> bool:
    """Whether anything but this process lives in its session."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended while we looked
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == os.getsid(0) and fields[0] != "Z":
                    return True
    return False


def die_with_guardian() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_with_run() -> None:
    """In the guardian before it starts: a fork of the run may hold the pipe open when the run is dead."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
