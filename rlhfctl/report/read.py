"""What a run directory holds, as far as it is there and whole: a report of a run that failed early is a report too."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhfctl.errors import UsageError
from rlhfctl.recipe.changes import flat
from rlhfctl.recipe.yaml12 import parse
from rlhfctl.run_dir import RunDir, json_lines

MOST_TREES = 3
MOST_SAMPLES = 400  # newest records of samples.jsonl that are looked at
LARGEST = 1e300  # of a number in a curve: differences of larger ones are infinite


@dataclass(slots=True)
class Evaluation:
    """One `rlhfctl eval` whose --out lies in the run directory. trees: of --save-trees beside it, the first few."""

    name: str
    summary: dict[str, Any]
    trees: list[dict[str, Any]]


@dataclass(slots=True)
class Run:
    """One run, read. recipe: dotted keys to values. damaged: files whose content could not be read, with the cause."""

    path: Path
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    preflight: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    quarantine: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) where the metric has a value that can be drawn."""
        return [
            (float(row["step"]), float(row[name]))
            for row in self.metrics
            if isinstance(row.get(name), int | float)
            and abs(row[name]) < LARGEST
            and isinstance(row.get("step"), int)
        ]

    def numbers(self) -> list[str]:
        """Names of the metrics that are numbers, in order of first appearance."""
        names = dict.fromkeys(name for row in self.metrics for name in row if name != "step")
        return [name for name in names if self.series(name)]


def read_run(path: Path) -> Run:
    """Raises UsageError where the directory is no run."""
    if not (path / "recipe.yaml").is_file():
        raise UsageError(f"{path} is not a run directory: it has no recipe.yaml")
    directory, run = RunDir(path), Run(path, path.name)
    try:
        run.recipe = flat(
            parse(directory.recipe.read_text(encoding="utf-8"), str(directory.recipe)).value, ""
        )
    except Exception as error:  # whatever the file holds, the rest of the run is worth showing
        run.damaged.append(f"recipe.yaml: {error}")
    run.name = str(run.recipe.get("name", path.name))
    run.status = one_object(run, directory.status)
    run.launch = one_object(run, directory.launch)
    run.preflight = one_object(run, directory.preflight)
    run.metrics = objects(run, directory.metrics)
    run.samples = objects(run, directory.samples)[-MOST_SAMPLES:]
    for found in evaluations_of(path):
        trees = objects(run, found.with_name("trees.jsonl"))[:MOST_TREES]
        name = found.parent.relative_to(path).as_posix()
        run.evaluations.append(Evaluation("eval" if name == "." else name, one_object(run, found), trees))
    for row in objects(run, directory.quarantine):
        cause = str(row.get("error") or "").splitlines() or [""]
        run.quarantine[(str(row.get("source")), str(row.get("status")), cause[0][:200])] += 1
    return run


def evaluations_of(run: Path) -> list[Path]:
    """The eval.json of the run directory and of two levels below."""
    return sorted({*run.glob("eval.json"), *run.glob("*/eval.json"), *run.glob("*/*/eval.json")})


def one_object(run: Run, path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.damaged.append(f"{path.name}: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def objects(run: Run, path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; a line that is no object is left out and told."""
    if not path.exists():
        return []
    found, bad = [], 0
    try:
        lines = json_lines(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        run.damaged.append(f"{path.name}: {error}")
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(row, dict):
            found.append(row)
    if bad:
        run.damaged.append(f"{path.name}: {bad} line(s) that are not JSON were left out")
    return found


def differences(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    """Recipe keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    rows = [(key, [run.recipe.get(key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]
