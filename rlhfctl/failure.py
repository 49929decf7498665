"""Why a rank failed: a small file written by the worker and read by the launcher, and the lines a person sees.

torchrun turns every worker's exit code into 1 and its own record keeps whole seconds only, which cannot tell the
rank that failed first from those that lost their peer; these files keep the exit code and the exact time.
"""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhfctl.run_dir import RunDir, write_text


@dataclass(slots=True)
class Failure:
    """sentence: a known failure in the user's terms; None: a bug or an unknown error, told by `exception`."""

    rank: int
    world: int
    exception: str
    exit_code: int
    log: str
    time: float
    sentence: str | None = None
    traceback: str = ""


def failure_file(attempt: Path, rank: int) -> Path:
    return attempt / f"rank{rank}.error.json"


def write_failure(attempt: Path, failure: Failure) -> None:
    """Best effort: on a full disk the launcher falls back on torchrun's own words."""
    try:
        write_text(failure_file(attempt, failure.rank), json.dumps(asdict(failure)) + "\n", durable=False)
    except OSError:
        return


def first_failure(attempt: Path) -> Failure | None:
    """The earliest failure over all ranks: the later ones are mostly ranks that lost their peer."""
    failures = []
    for path in sorted(attempt.glob("rank*.error.json")):
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            failures.append(Failure(**fields))
        except (OSError, ValueError, TypeError):
            continue
    return min(failures, key=lambda failure: failure.time, default=None)


def resume_command(task: str, run: RunDir) -> str:
    recipe, directory = shlex.quote(str(run.recipe)), shlex.quote(str(run.path))
    return f"rlhfctl {task} {recipe} --run-dir {directory} --resume"


def report_lines(failure: Failure, task: str, run: RunDir, with_traceback: bool) -> list[str]:
    """What goes to stderr: rank, exception, log path, resume command; before them the traceback on request."""
    lines = failure.traceback.rstrip().splitlines() if with_traceback and failure.traceback else []
    return [
        *lines,
        f"rank:      {failure.rank} of {failure.world}",
        f"exception: {failure.sentence or failure.exception}",
        f"log:       {failure.log}",
        f"resume:    {resume_command(task, run)}",
    ]
