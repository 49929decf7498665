"""The closing table of the quickstart: accuracy before and after each stage, read from the run directories.

`python -m rlhfctl.quickstart.table RUN...`: before and after are the first and the last line of a run's
metrics.jsonl that hold `eval/accuracy` and `eval/path_accuracy`. Of a policy that is the share of greedy answers whose
final digit is right, and whose every line is right as well; of a reward model the share of fresh pairs whose right
chain scores higher. A run without such a line ends the command with exit code 1.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ACCURACY, PATH_ACCURACY = "eval/accuracy", "eval/path_accuracy"


def read_stage(run: Path) -> dict[str, Any]:
    """task, state and the four accuracies of a run. Raises ValueError with a sentence where they are not there."""
    evaluations = []
    try:
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if ACCURACY in row:
                evaluations.append(row)
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{run} is not a finished run: {Path(error.filename).name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{run}/metrics.jsonl or status.json is damaged: {error}") from None
    if not evaluations:
        raise ValueError(f"{run}/metrics.jsonl holds no {ACCURACY}: the recipe needs data.eval and a reward")
    first, last = evaluations[0], evaluations[-1]
    task = _task(run)
    return {
        "task": task,
        "of": "pairs" if task == "rm" else "answers",
        "state": status.get("state", "unknown"),
        "steps": last.get("step"),
        "before": first[ACCURACY],
        "after": last[ACCURACY],
        "path_before": first.get(PATH_ACCURACY),
        "path_after": last.get(PATH_ACCURACY),
        "run": str(run),
    }


def _task(run: Path) -> str:
    """The resolved recipe's task; a regular expression, so that the table needs no YAML reader."""
    recipe = run / "recipe.yaml"
    found = (
        re.search(r"^task:\s*(\w+)", recipe.read_text(encoding="utf-8"), re.M) if recipe.exists() else None
    )
    return found.group(1) if found else run.name


def render(stages: list[dict[str, Any]]) -> str:
    """Plain text: right-aligned percentages, one row a stage."""
    header = [
        "stage",
        "state",
        "steps",
        "of",
        "accuracy before",
        "after",
        "whole path before",
        "after",
        "run",
    ]
    rows = [header]
    for stage in stages:
        shares = [stage[key] for key in ("before", "after", "path_before", "path_after")]
        percents = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        rows.append(
            [stage["task"], stage["state"], str(stage["steps"]), stage["of"], *percents, stage["run"]]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    left = {0, 1, 3, len(header) - 1}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in cells
        ).rstrip()
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    runs = sys.argv[1:] if argv is None else argv
    if not runs or runs[0].startswith("-"):
        print("usage: python -m rlhfctl.quickstart.table RUN_DIR...", file=sys.stderr)
        return 2
    try:
        stages = [read_stage(Path(run)) for run in runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render(stages))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
