"""Curves of finished quickstart runs beside each other: python -m benchmarks.learning.dense_rewards ROOT OUT

ROOT/sSEED/NAME are run directories of `rlhfctl ppo` (what each NAME was run with is in dense-rewards.md). Writes
OUT.json (all curves) and prints a table: steps to 80 % greedy accuracy; accuracy, path accuracy, KL at the last step.
"""

import json
import sys
from pathlib import Path
from typing import Any

GOAL = 0.8


def curve(run: Path) -> dict[str, Any]:
    """Evaluations of one run, and its last KL from the reference."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/path_accuracy" in record]
    reached = next((record["step"] for record in evaluated if record["eval/accuracy"] >= GOAL), None)
    return {
        "steps": [record["step"] for record in evaluated],
        "accuracy": [record["eval/accuracy"] for record in evaluated],
        "path_accuracy": [record["eval/path_accuracy"] for record in evaluated],
        "kl": next(
            (record["kl/reference"] for record in reversed(records) if "kl/reference" in record), None
        ),
        "steps_to_goal": reached,
    }


def main(root: Path, out: Path) -> None:
    finished = sorted(
        path.parent for path in root.glob("s*/*/final") if (path.parent / "metrics.jsonl").is_file()
    )
    found: dict[str, dict[str, Any]] = {}
    for run in finished:
        found_curve = curve(run)
        if not found_curve["steps"]:  # a reward model, or a run without evaluation
            continue
        found.setdefault(run.name, {})[run.parent.name.removeprefix("s")] = found_curve
    out.write_text(json.dumps(found, indent=1) + "\n")
    print("| reward | seed | steps to 80 % | last step | accuracy | path accuracy | kl/reference |")
    print("|---|---|---|---|---|---|---|")
    for name, seeds in found.items():
        for seed, run in seeds.items():
            accuracy, path = run["accuracy"][-1], run["path_accuracy"][-1]
            reached = run["steps_to_goal"] or "not reached"
            print(
                f"| {name} | {seed} | {reached} | {run['steps'][-1]} | {accuracy:.3f} | {path:.3f} | {run['kl']:.3f} |"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
