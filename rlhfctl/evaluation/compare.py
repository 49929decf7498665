"""Two evaluations of the same prompts, paired prompt by prompt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhfctl.data.overlap import key, turns
from rlhfctl.data.samples import Sample
from rlhfctl.errors import UsageError
from rlhfctl.evaluation.estimates import Estimate, paired_difference
from rlhfctl.evaluation.results import RESULTS
from rlhfctl.run_dir import json_lines

Records = dict[str, dict[str, Any]]


def read(path: Path) -> Records:
    """results.jsonl, or the directory that holds it, by id. Raises UsageError where that is not what it is."""
    file = path / RESULTS if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in json_lines(file.read_text(encoding="utf-8"))]
        return {
            row["id"]: {name: row[name] for name in ("accuracy", "path_accuracy", "method")}
            | {"turns": turns(row["messages"]) if "messages" in row else None}
            for row in rows
        }
    except OSError as error:
        raise UsageError(f"--compare {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--compare {file} is no results.jsonl of `rlhfctl eval --out`") from None


def refuse_strangers(ids: Sequence[str], other: Records) -> None:
    """Before anything is generated. Raises UsageError where no prompt is in both."""
    if other.keys().isdisjoint(ids):
        raise UsageError("--compare: the two evaluations have no prompt (id) in common")


def other_prompts(prompts: Sequence[Sample], other: Records) -> str | None:
    """A warning where ids that both have stand for other prompts, as numbers of rows of two files do."""
    common = [prompt for prompt in prompts if prompt.id in other]
    moved = [prompt.id for prompt in common if other[prompt.id]["turns"] not in (None, key(prompt))]
    if not moved:
        return None
    return (
        f"warning: --compare pairs by id, and {len(moved)} of {len(common)} ids in common have another prompt there, "
        f"{moved[0]} first: what is compared may be other questions"
    )


def differences(records: Sequence[dict[str, Any]], other: Records) -> dict[str, Estimate]:
    """Ours minus theirs over the prompts that both have."""
    common = [(record, other[record["id"]]) for record in records if record["id"] in other]
    found = {}
    for name in ("accuracy", "path_accuracy"):
        pairs = [
            (ours[name], theirs[name]) for ours, theirs in common if None not in (ours[name], theirs[name])
        ]
        estimate = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        if estimate is not None:
            found[f"{name} {common[0][0]['method']} - {common[0][1]['method']} (compared)"] = estimate
    return found
