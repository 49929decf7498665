"""The process that runs programs: warm, and a fork of it for each program, so that none can spoil another's world.

One request is a list of programs, one answer a list of [value or null, how it ended]; several run at a time. How:
ok, none (no number came back: an exception, no solution(), the memory or CPU limit), late (the time limit).
"""

import math
import os
import selectors
import signal
import time
import warnings
from typing import Any

from rlhfctl.rewards.child_loop import Handler, NotReady, serve
from rlhfctl.rewards.sandbox import lock_in, supported

MEMORY = 256 << 20
LONGEST = 64  # bytes of a float's text
HEADER = "import math\n"


def main(argv: list[str]) -> None:
    jobs, cpu_seconds, seconds = (int(word) for word in argv)
    serve(lambda: prepare(jobs, cpu_seconds, seconds))


def prepare(jobs: int, cpu_seconds: int, seconds: int) -> Handler:
    """Everything a program may import must be here before the fork: behind the walls no file can be opened."""
    import calendar  # noqa: F401
    import cmath  # noqa: F401
    import collections  # noqa: F401
    import datetime  # noqa: F401
    import decimal  # noqa: F401
    import fractions  # noqa: F401
    import functools  # noqa: F401
    import itertools  # noqa: F401
    import operator  # noqa: F401
    import random  # noqa: F401
    import re  # noqa: F401
    import statistics  # noqa: F401
    import string  # noqa: F401

    if reason := supported():
        raise NotReady(reason)
    try:
        import sympy  # type: ignore[import-untyped,unused-ignore]

        sympy.solve(sympy.Symbol("x") * 2 - 6)  # imports what it needs at its first call
    except ImportError:
        pass  # programs that need it fail, as they do on any machine without it
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    if run_all(["def solution():\n    return 1\n"], 1, cpu_seconds, seconds) != [[1.0, "ok"]]:
        raise NotReady(
            "a program cannot be locked in on this machine (seccomp or resource limits are refused)"
        )
    return lambda programs: run_all(programs, jobs, cpu_seconds, seconds)


def run_all(programs: list[str], jobs: int, cpu_seconds: int, seconds: int) -> list[list[Any]]:
    """[value, how] of each, at most `jobs` at a time."""
    results: list[list[Any]] = [[None, "late"] for _ in programs]
    waiting = list(range(len(programs)))[::-1]
    running: dict[int, tuple[int, int, float]] = {}  # descriptor -> program, pid, deadline
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.pop()
                pid, descriptor = fork(programs[index], cpu_seconds)
                running[descriptor] = index, pid, time.monotonic() + seconds
                selector.register(descriptor, selectors.EVENT_READ)
            first = min(deadline for _, _, deadline in running.values())
            done = [key.fd for key, _ in selector.select(max(0.0, first - time.monotonic()))]
            for descriptor in done:
                results[running[descriptor][0]] = read(descriptor)
            now = time.monotonic()
            over = [fd for fd, (_, _, deadline) in running.items() if deadline <= now and fd not in done]
            for descriptor in [*done, *over]:
                _, pid, _ = running.pop(descriptor)
                selector.unregister(descriptor)
                os.close(descriptor)
                os.kill(pid, signal.SIGKILL)  # it is still ours: nobody has waited for it
                os.waitpid(pid, 0)
    return results


def fork(program: str, cpu_seconds: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        lock_in(writing, MEMORY, cpu_seconds)
        os.write(3, repr(value_of(program)).encode()[:LONGEST])
    finally:
        os._exit(0)


def value_of(program: str) -> float:
    """float(solution()) of the program. Raises whatever it raises."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(HEADER + program, "<program>", "exec"), names)
    return float(names["solution"]())


def read(descriptor: int) -> list[Any]:
    """What a program that wrote or ended has left in the pipe. It is not trusted: a float's text, or nothing."""
    try:
        value = float(os.read(descriptor, LONGEST))
    except ValueError:
        return [None, "none"]
    return [value, "ok"] if math.isfinite(value) else [None, "none"]
