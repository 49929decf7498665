"""From sums over a batch to the metrics of a step (docs/metrics.md)."""

from collections.abc import Sequence

from rlhfctl.data.encode_judged import JudgedRow
from rlhfctl.recipe.sections import RewardModelling


def counts_of(rows: Sequence[JudgedRow]) -> dict[str, int]:
    """What the losses of a batch are means over."""
    pairs = sum(row.rejected is not None for row in rows)
    return {
        "pairs": pairs,
        "answers": sum((row.target is not None) * (1 + (row.rejected is not None)) for row in rows),
        "steps": sum(row.labelled for row in rows),
    }


def step_metrics(
    sums: dict[str, float], counts: dict[str, int], algorithm: RewardModelling
) -> dict[str, float]:
    """sums: over all ranks. Losses are means already: their weights hold the counts."""
    metrics: dict[str, float] = {}
    if algorithm.objective == "step":
        metrics["loss/rm"] = sums["step_loss"]
        metrics["rm/accuracy"] = ratio(sums["steps_correct"], counts["steps"])
        return metrics
    unit = "pairs" if algorithm.objective == "pairwise" else "answers"
    metrics["loss/rm"] = sums["loss"]
    metrics["rm/accuracy"] = ratio(sums["correct"], counts[unit])
    if algorithm.objective == "pairwise":
        metrics["rm/margin"] = ratio(sums["gap"], counts["pairs"])
    mean = ratio(sums["scores"], sums["answers"])
    metrics["rm/score_mean"] = mean
    metrics["rm/score_std"] = max(ratio(sums["squares"], sums["answers"]) - mean**2, 0.0) ** 0.5
    if algorithm.step_coef > 0:
        metrics["loss/rm_step"] = sums["step_loss"]
        metrics["rm/step_accuracy"] = ratio(sums["steps_correct"], counts["steps"])
    return metrics


def ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
