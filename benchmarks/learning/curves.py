"""One run's metrics.jsonl as a curve, and the curves of all runs as a table."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """accuracy[i]: of greedy answers to the evaluation rows after steps[i] steps.

    cpu_seconds: of all training steps, evaluation, start-up and loading excluded: the mean over steps without an
    evaluation times the number of steps. tokens: response tokens sampled for training.
    """

    method: str
    seed: int
    steps: list[int]
    accuracy: list[float]
    cpu_seconds: float
    tokens: int

    def steps_to(self, accuracy: float) -> int | None:
        """The first evaluated step that reaches it; None where none does."""
        return next((s for s, a in zip(self.steps, self.accuracy, strict=True) if a >= accuracy), None)

    def at(self, step: int) -> float:
        return self.accuracy[self.steps.index(step)]


def read_curve(run: Path, method: str, seed: int) -> Curve:
    """Needs train.log_every 1, so that steps with an evaluation have records of their own."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/accuracy" in record]
    plain = [record["seconds/cpu"] for record in records if "eval/accuracy" not in record]
    return Curve(
        method,
        seed,
        [record["step"] for record in evaluated],
        [record["eval/accuracy"] for record in evaluated],
        round(statistics.fmean(plain) * records[-1]["step"], 1),
        records[-1]["tokens"],
    )


def to_json(curves: Sequence[Curve]) -> str:
    lines = ",\n".join(json.dumps(asdict(curve)) for curve in curves)
    return f"[\n{lines}\n]\n"


def from_json(text: str) -> list[Curve]:
    return [Curve(**row) for row in json.loads(text)]


def spread(values: Sequence[float], digits: int) -> str:
    """`mean (lowest .. highest)`."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values))
    )
    return f"{mean} ({low} .. {high})"


def table(curves: Sequence[Curve], marks: Sequence[int], goal: float) -> str:
    """Markdown, one row a method: accuracy at the marked steps, steps to the goal, CPU seconds.

    Each as mean (lowest .. highest) over the seeds.
    """
    methods = list(dict.fromkeys(curve.method for curve in curves))
    head = ["method", "seeds", *(f"step {mark}" for mark in marks), f"steps to {goal:.2f}", "CPU s"]
    rows = [head, ["---"] * len(head)]
    for method in methods:
        own = [curve for curve in curves if curve.method == method]
        reached = [curve.steps_to(goal) for curve in own]
        got = [step for step in reached if step is not None]
        if len(got) == len(own):
            steps = spread(got, 0)
        else:
            steps = f"{len(got)} of {len(own)} seeds" + (f": {', '.join(map(str, got))}" if got else "")
        accuracies = [spread([curve.at(mark) for curve in own], 3) for mark in marks]
        rows.append(
            [method, str(len(own)), *accuracies, steps, spread([curve.cpu_seconds for curve in own], 0)]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
