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
    evaluation times the number of steps. tokens: response tokens sampled for training. path_accuracy: of answers with
    every line right, and kl: nats per token from the reference, both at the last evaluation; None where not measured.
    """

    method: str
    seed: int
    steps: list[int]
    accuracy: list[float]
    cpu_seconds: float
    tokens: int
    path_accuracy: float | None = None
    kl: float | None = None

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
        evaluated[-1].get("eval/path_accuracy"),
        next((record["kl/reference"] for record in reversed(records) if "kl/reference" in record), None),
    )


def to_json(curves: Sequence[Curve]) -> str:
    lines = ",\n".join(json.dumps(asdict(curve)) for curve in curves)
    return f"[\n{lines}\n]\n"


def from_json(text: str) -> list[Curve]:
    return [Curve(**row) for row in json.loads(text)]


def marks(curves: Sequence[Curve], most: int = 5) -> list[int]:
    """Steps to show: evaluated in every curve, about evenly spread, the first and the last among them."""
    common = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    if len(common) <= most:
        return common
    return [common[round(place * (len(common) - 1) / (most - 1))] for place in range(most)]


def spread(values: Sequence[float], digits: int) -> str:
    """`mean (lowest .. highest)`."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values))
    )
    return f"{mean} ({low} .. {high})"


def table(curves: Sequence[Curve], shown: Sequence[int], goal: float) -> str:
    """Markdown, one row a method: accuracy at the steps `shown`, path accuracy and KL at the end, steps to
    the goal, CPU seconds.

    Each as mean (lowest .. highest) over the seeds.
    """
    methods = list(dict.fromkeys(curve.method for curve in curves))
    head = ["method", "seeds", *(f"step {mark}" for mark in shown), "every line right", "kl"]
    head += [f"steps to {goal:.2f}", "CPU s"]
    rows = [head, ["---"] * len(head)]
    for method in methods:
        own = [curve for curve in curves if curve.method == method]
        reached = [curve.steps_to(goal) for curve in own]
        got = [step for step in reached if step is not None]
        if len(got) == len(own):
            steps = spread(got, 0)
        else:
            steps = f"{len(got)} of {len(own)} seeds" + (f": {', '.join(map(str, got))}" if got else "")
        accuracies = [spread([curve.at(mark) for curve in own], 3) for mark in shown]
        paths = [curve.path_accuracy for curve in own if curve.path_accuracy is not None]
        kls = [curve.kl for curve in own if curve.kl is not None]
        guards = [spread(values, 3) if values else "" for values in (paths, kls)]
        cpu = spread([curve.cpu_seconds for curve in own], 0)
        rows.append([method, str(len(own)), *accuracies, *guards, steps, cpu])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
