"""The files of an evaluation: one line a prompt, and the object that --json prints."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfctl.errors import UsageError, unwritable
from rlhfctl.evaluation.estimates import Estimate
from rlhfctl.run_dir import write_named

if TYPE_CHECKING:
    from rlhfctl.evaluation.run import Result, Row
    from rlhfctl.evaluation.settings import Settings

RESULTS, SUMMARY = "results.jsonl", "eval.json"


def records(rows: Sequence["Row"], method: str) -> list[dict[str, Any]]:
    """accuracy, path_accuracy: of what was asked for (a mean over the samples with sample), for paired comparison."""
    return [_record(row, method) for row in rows]


def _record(row: "Row", method: str) -> dict[str, Any]:
    answers = [row.chosen] if row.chosen is not None else row.samples or [row.greedy]
    record: dict[str, Any] = {
        "id": row.prompt.sample.id,
        "method": method,
        "accuracy": _share([answer.correct for answer in answers]),
        "path_accuracy": _share([answer.path_correct for answer in answers]),
        "messages": row.prompt.sample.prompt(),
        "label": row.prompt.sample.label,
        "greedy": row.greedy.record(),
    }
    if row.samples:
        record["samples"] = [answer.record() for answer in row.samples]
    if row.chosen is not None:
        record["chosen"] = row.chosen.record()
    return record


def _share(verdicts: Sequence[bool | None]) -> float | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) / len(known) if known else None


def summary(result: "Result") -> dict[str, Any]:
    return {
        "method": result.method,
        "metrics": {name: described(estimate) for name, estimate in result.measures.items()},
        "differences": {name: described(estimate) for name, estimate in result.differences.items()},
        **result.facts,
    }


def described(estimate: Estimate) -> dict[str, Any]:
    """As JSON has it: an infinite bound is null."""
    return {
        key: None if isinstance(value, float) and abs(value) == float("inf") else value
        for key, value in asdict(estimate).items()
    }


def write(directory: Path, lines: Sequence[dict[str, Any]], result: "Result") -> Path:
    """DIR/results.jsonl and DIR/eval.json. Raises as write_whole."""
    write_lines(directory / RESULTS, lines)
    text = json.dumps({"schema": 1, **summary(result)}, indent=1, default=str)
    write_whole(directory / SUMMARY, text + "\n")
    return directory


def refuse_unwritable(settings: "Settings", data: Sequence[str]) -> None:
    """Before anything is sampled: hours of answers are not lost for a directory that nobody can write to, nor what is
    evaluated on or another result for a name that is given twice. Raises UsageError; makes the directories, no file."""
    wanted = [] if settings.out is None else [settings.out / RESULTS, settings.out / SUMMARY]
    wanted += [each for each in (settings.trajectories, settings.trees) if each is not None]
    taken = {os.path.realpath(each) for each in data}
    for path in wanted:
        if os.path.realpath(path) in taken and not path.is_char_device():
            raise UsageError(
                f"{path} would be overwritten: it holds the prompts, or another option writes it too"
            )
        taken.add(os.path.realpath(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None
        if path.is_dir():
            raise UsageError(f"cannot write {path}: it is a directory")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"cannot write {path}: permission denied")


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line. Raises as write_whole."""
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def write_whole(path: Path, text: str) -> None:
    """The whole file or none: half of the trajectories would be trained on as if they were all. Raises Unable for a
    full disk, UsageError for what else cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_named(path, text)
    except OSError as error:
        raise unwritable(path, error) from None
