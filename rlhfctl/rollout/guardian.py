"""A process between a run and a server that it started: the server ends when the run does, however that happens.

    python -m rlhfctl.rollout.guardian ARGV...

stdin is a pipe from the run: its end is the order to stop, given by closing it or by dying. The server gets SIGTERM,
and GRACE seconds later everything in this session SIGKILL, what the server has started included.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 10.0
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, preexec_fn=die_with_guardian)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: end(child))
    while child.poll() is None:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 64):
            end(child)
    os.killpg(0, signal.SIGKILL)  # what it left


def end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    ends = time.monotonic() + GRACE
    while child.poll() is None and time.monotonic() < ends:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def die_with_guardian() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
