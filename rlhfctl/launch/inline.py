"""Training in this very process: one CPU or one GPU, no second interpreter to start."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from rlhfctl.launch.plan import Plan
from rlhfctl.run_dir import RunDir
from rlhfctl.stop import StopRequest


def run_inline(plan: Plan, run: RunDir, attempt: int, resume: bool, stop: StopRequest, quiet: bool) -> int:
    """The worker's exit code. The environment is set before torch can be imported: libgomp reads it once.

    quiet: what would go to stderr goes into the attempt's console.log.
    """
    os.environ.update(plan.env)
    from rlhfctl import worker

    with stdout_to_stderr(), stderr_aside(run, attempt, quiet) as progress:
        return worker.run(run.path, resume, attempt, inline=True, stop=stop, console=progress)


@contextlib.contextmanager
def stderr_aside(run: RunDir, attempt: int, quiet: bool) -> Iterator[TextIO]:
    if not quiet:
        yield sys.stderr
        return
    with open(run.attempt(attempt) / "console.log", "a", buffering=1) as log, contextlib.redirect_stderr(log):
        yield log


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """stdout carries the command's result alone: whatever a library prints meanwhile goes to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
