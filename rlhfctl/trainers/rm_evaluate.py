"""Evaluation of a reward model on data.eval: accuracy beside that of a rule that looks at nothing but length."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.algorithms.reward_model import area_under_curve, binary_loss, calibration_error, pairwise_loss
from rlhfctl.models.packing import plan_packs, split_over_ranks
from rlhfctl.recipe.tasks import RmRecipe
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import gather_lists
from rlhfctl.trainers.rm_data import load_rows, score_pack


@dataclass(slots=True)
class Scored:
    """One row of data.eval. chosen, rejected: (score, tokens); steps: (score, label) of the labelled ones in order."""

    row: int
    chosen: tuple[float, int]
    rejected: tuple[float, int] | None
    target: float | None
    margin: float
    steps: list[tuple[float, float]]


class RmEvaluator:
    """Holds the evaluation rows, encoded once. wanted: the recipe has data.eval."""

    def __init__(self, ctx: RunContext, encoder: ChatEncoder, pad: int | None) -> None:
        assert isinstance(ctx.recipe, RmRecipe)
        self.ctx, self.recipe, self.pad = ctx, ctx.recipe, pad
        self.wanted = bool(self.recipe.data.eval)
        if self.wanted:
            self.data = load_rows(self.recipe, self.recipe.data.eval, encoder)
            self.members = list(range(len(self.data.rows)))[: self.recipe.train.eval_samples]

    def due(self, step: int, total: int) -> bool:
        every = self.recipe.train.eval_every
        return self.wanted and (step == total or (every > 0 and step % every == 0))

    @torch.no_grad()
    def run(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        mine = split_over_ranks(self.members, self.data.lengths, self.ctx.world)[self.ctx.rank]
        scored: list[Scored] = []
        for members in plan_packs(mine, self.data.lengths, self.recipe.train.tokens_per_microbatch):
            rows = [self.data.rows[row] for row in members]
            scores = score_pack(model, rows, self.recipe.algorithm, self.pad, device)
            chosen, rejected, steps = (
                part.tolist() for part in (scores.chosen, scores.rejected, scores.steps)
            )
            ends = iter(steps)
            for place, (index, row) in enumerate(zip(members, rows, strict=True)):
                marks = [(next(ends), label) for label in row.step_labels]
                scored.append(
                    Scored(
                        index,
                        (chosen[place], len(row.chosen.ids)),
                        None if row.rejected is None else (rejected[place], len(row.rejected.ids)),
                        row.target,
                        row.margin,
                        [(score, label) for score, label in marks if label is not None],
                    )
                )
        everything: list[Scored] = sorted(gather_lists(scored), key=lambda item: item.row)
        return metrics_of(everything, self.recipe)


def metrics_of(scored: list[Scored], recipe: RmRecipe) -> dict[str, float]:
    algorithm = recipe.algorithm
    metrics: dict[str, float] = {}
    if algorithm.objective == "pairwise":
        pairs = [item for item in scored if item.rejected is not None]
        metrics |= pair_metrics(pairs, algorithm.margin_coef, algorithm.center_coef) if pairs else {}
    elif algorithm.objective == "outcome":
        metrics |= answer_metrics(scored)
    if algorithm.steps:
        metrics |= step_metrics(scored, algorithm.objective == "step")
    return metrics


def pair_metrics(pairs: list[Scored], margin_coef: float, center_coef: float) -> dict[str, float]:
    chosen, rejected = (
        tensor([item.chosen[0] for item in pairs]),
        tensor([item.rejected[0] for item in pairs if item.rejected]),
    )
    lengths = tensor([item.chosen[1] - item.rejected[1] for item in pairs if item.rejected])
    margins = tensor([margin_coef * item.margin for item in pairs])
    weights = torch.full_like(chosen, 1 / len(pairs))
    loss, stats = pairwise_loss(chosen, rejected, margins, weights, center_coef)
    gap = chosen - rejected
    return {
        "eval/loss": loss.item(),
        "eval/accuracy": stats["correct"].item() / len(pairs),
        "eval/length_accuracy": right(lengths).mean().item(),
        "eval/margin": gap.mean().item(),
        # How sure it is of the side it takes, whichever that is, against how often that side is the chosen one.
        "eval/calibration_error": calibration_error(gap.abs().sigmoid(), right(gap)),
        **spread(torch.cat([chosen, rejected])),
    }


def answer_metrics(scored: list[Scored]) -> dict[str, float]:
    answers: list[tuple[float, int, float]] = []
    for item in scored:
        if item.target is not None:
            answers.append((*item.chosen, item.target))
            if item.rejected is not None:
                answers.append((*item.rejected, 0.0))
    if not answers:
        return {}
    scores, lengths, targets = (tensor(list(column)) for column in zip(*answers, strict=True))
    loss, stats = binary_loss(scores, targets, torch.full_like(scores, 1 / len(answers)))
    by_length = area_under_curve(lengths, targets > 0.5)
    return {
        "eval/loss": loss.item(),
        "eval/accuracy": stats["correct"].item() / len(answers),
        "eval/auc": area_under_curve(scores, targets > 0.5),
        "eval/length_auc": max(by_length, 1 - by_length),  # whichever way round it tells more
        "eval/calibration_error": calibration_error(scores.sigmoid(), targets),
        **spread(scores),
    }


def step_metrics(scored: list[Scored], alone: bool) -> dict[str, float]:
    """alone: there is no other loss."""
    steps = [step for item in scored for step in item.steps]
    if not steps:
        return {}
    scores, labels = (tensor(list(column)) for column in zip(*steps, strict=True))
    loss, stats = binary_loss(scores, labels, torch.full_like(scores, 1 / len(steps)))
    flawed = [item.steps for item in scored if any(label <= 0.5 for _, label in item.steps)]
    found = [
        first_wrong([s > 0 for s, _ in item]) == first_wrong([y > 0.5 for _, y in item]) for item in flawed
    ]
    metrics = {
        "eval/step_accuracy": stats["correct"].item() / len(steps),
        "eval/step_auc": area_under_curve(scores, labels > 0.5),
        "eval/first_wrong_step": sum(found) / len(found) if found else float("nan"),
    }
    if alone:
        metrics |= {
            "eval/loss": loss.item(),
            "eval/accuracy": metrics["eval/step_accuracy"],
            "eval/calibration_error": calibration_error(scores.sigmoid(), labels),
        }
    return metrics


def first_wrong(good: list[bool]) -> int:
    """Index of the first step that is not good; their number where all are."""
    return next((index for index, each in enumerate(good) if not each), len(good))


def right(differences: Tensor) -> Tensor:
    """1 where the first of two is larger, one half where they are equal."""
    return (differences > 0).double() + 0.5 * (differences == 0).double()


def spread(scores: Tensor) -> dict[str, float]:
    return {"eval/score_mean": scores.mean().item(), "eval/score_std": scores.std(correction=0).item()}


def tensor(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
