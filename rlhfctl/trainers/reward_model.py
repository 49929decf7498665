"""Reward models: pairs, right or wrong answers, right or wrong steps; the global batch is the unit of every mean."""

import time

import torch
from torch import Tensor, nn

from rlhfctl.algorithms.reward_model import binary_loss, pairwise_loss
from rlhfctl.data.encode_judged import JudgedRow
from rlhfctl.errors import Refused
from rlhfctl.models.encoder_training import is_encoder
from rlhfctl.models.load import config_of
from rlhfctl.models.packing import plan_packs, split_over_ranks
from rlhfctl.models.reward_export import RewardFacts, export_reward_model
from rlhfctl.models.reward_training import load_for_training
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.recipe.tasks import RmRecipe
from rlhfctl.trainers import checkpoint
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import barrier, sum_over_ranks
from rlhfctl.trainers.engine import build_optimizer, passes, whole, whole_on_rank_zero
from rlhfctl.trainers.logbook import Logbook, refuse_non_finite
from rlhfctl.trainers.optimizer import PLAIN, Passes, clip_and_step
from rlhfctl.trainers.rm_data import PackScores, RmData, load_rows, padding_id, score_pack, total_steps
from rlhfctl.trainers.rm_evaluate import RmEvaluator
from rlhfctl.trainers.rm_metrics import counts_of, step_metrics

SUMS = ("loss", "step_loss", "correct", "gap", "steps_correct", "scores", "squares", "answers")


def train(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, RmRecipe)
    encoder = policy_encoder(recipe.policy, ctx.say)
    data = load_rows(recipe, recipe.data.train, encoder)
    model, head = load_for_training(recipe.policy, recipe.algorithm.head, ctx.device, recipe.seed)
    if is_encoder(model) and (recipe.algorithm.steps or recipe.algorithm.score != "last_token"):
        raise Refused(
            "a reward model over an encoder gives one score a conversation: no token_sum, no step labels"
        )
    ctx.say(f"reward head: {head}")
    pad = padding_id(encoder, config_of(model).pad_token_id)
    total = total_steps(recipe, data)
    limit = recipe.optim.max_grad_norm
    optimizer = build_optimizer(recipe, [model], model.named_parameters(), recipe.optim.lr, total, limit)
    evaluator = RmEvaluator(ctx, encoder, pad)

    models, optimizers = {"reward_model": model}, {"reward_model": optimizer}
    state = checkpoint.restore(ctx, models, optimizers) or {"step": 0, "tokens": 0, "scores": {}}
    start, seen, scores = state["step"], state["tokens"], state["scores"]
    logbook = Logbook(ctx, total, start)
    if start == 0 and evaluator.wanted:
        with whole([optimizer]):
            logbook.log(0, evaluator.run(model), force=True)

    for step in range(start, total):
        began = time.perf_counter()
        rows = data.order.batch(step)
        tokens = sum(data.lengths[row] for row in rows)
        counts = counts_of([data.rows[row] for row in rows])
        mine = split_over_ranks(rows, data.lengths, ctx.world)[ctx.rank]
        sums = sum_over_ranks(train_batch(model, data, mine, counts, recipe, pad, optimizer))
        metrics = step_metrics(sums, counts, recipe.algorithm)
        refuse_non_finite(step + 1, "loss/rm", metrics["loss/rm"])
        lr = optimizer.current_lr()
        norm = clip_and_step([optimizer], limit)[0]
        refuse_non_finite(step + 1, "grad_norm", norm)

        seen += tokens
        metrics |= {"grad_norm": norm, "lr": lr, "tokens": seen, "samples": len(rows)}
        elapsed = time.perf_counter() - began
        logbook.marks["train"] = elapsed
        metrics["tokens_per_second"] = tokens / elapsed
        if evaluator.due(step + 1, total):
            with logbook.timed("eval"), whole([optimizer]):
                found = evaluator.run(model)
            metrics |= found
            scores = {
                name: found[f"eval/score_{name}"] for name in ("mean", "std") if f"eval/score_{name}" in found
            }
        logbook.log(step + 1, metrics, force=evaluator.due(step + 1, total))

        state = {"step": step + 1, "tokens": seen, "scores": scores}
        checkpoint.step_boundary(ctx, models, optimizers, state, total)
    logbook.close()
    with whole_on_rank_zero([optimizer]):
        save_final(ctx, recipe, model, pad, scores)


def train_batch(
    model: nn.Module,
    data: RmData,
    rows: list[int],
    counts: dict[str, int],
    recipe: RmRecipe,
    pad: int | None,
    learner: Passes = PLAIN,
) -> dict[str, float]:
    """Forward and backward over this rank's rows; its part of each loss (weighted) and sums over its rows.

    counts: pairs, answers and labelled steps of the whole batch."""
    device = next(model.parameters()).device
    sums = dict.fromkeys(SUMS, 0.0)
    part: dict[str, float] = {}

    def forward() -> Tensor:
        nonlocal part
        loss, part = losses(score_pack(model, chosen, recipe.algorithm, pad, device), chosen, counts, recipe)
        return loss

    packs = plan_packs(rows, data.lengths, recipe.train.tokens_per_microbatch)
    for members, counted in passes([learner], packs):
        chosen = [data.rows[row] for row in members]
        loss = learner.run(forward)
        learner.backward(loss if counted else 0.0 * loss)
        for name, value in part.items() if counted else ():
            sums[name] += value
    return sums


def losses(
    scores: PackScores, rows: list[JudgedRow], counts: dict[str, int], recipe: RmRecipe
) -> tuple[Tensor, dict[str, float]]:
    """The pack's part of the loss of the whole batch, and what is added up for the metrics."""
    algorithm = recipe.algorithm
    sums: dict[str, float] = {}
    total = scores.chosen.new_zeros(())
    paired = [row.rejected is not None for row in rows]
    weights = scores.chosen.new_tensor

    if algorithm.objective == "pairwise" and any(paired):
        shares = weights([pair / counts["pairs"] for pair in paired])
        margins = weights([algorithm.margin_coef * row.margin for row in rows])
        loss, stats = pairwise_loss(scores.chosen, scores.rejected, margins, shares, algorithm.center_coef)
        sums |= {"loss": loss.item(), "correct": stats["correct"].item(), "gap": stats["gap"].item()}
        total = total + loss
    elif algorithm.objective == "outcome":
        targets = [row.target for row in rows] + [0.0 if pair else None for pair in paired]
        shares = weights([(target is not None) / max(1, counts["answers"]) for target in targets])
        filled = weights([target or 0.0 for target in targets])
        loss, stats = binary_loss(torch.cat([scores.chosen, scores.rejected]), filled, shares)
        sums |= {"loss": loss.item(), "correct": stats["correct"].item()}
        total = total + loss
    if algorithm.objective != "step":
        read = [row.rejected is not None or row.target is not None for row in rows]
        answers = torch.cat(
            [scores.chosen[weights(read).bool()], scores.rejected[weights(paired).bool()]]
        ).detach()
        sums |= {
            "scores": answers.double().sum().item(),
            "squares": answers.double().square().sum().item(),
            "answers": float(len(answers)),
        }
    if algorithm.steps and counts["steps"]:
        labels = [label for row in rows for label in row.step_labels]
        shares = weights([(label is not None) / counts["steps"] for label in labels])
        loss, stats = binary_loss(scores.steps, weights([label or 0.0 for label in labels]), shares)
        sums |= {"step_loss": loss.item(), "steps_correct": stats["correct"].item()}
        total = total + (1.0 if algorithm.objective == "step" else algorithm.step_coef) * loss
    return total, sums


def save_final(
    ctx: RunContext, recipe: RmRecipe, model: nn.Module, pad: int | None, scores: dict[str, float]
) -> None:
    """final/: the reward model in Hugging Face layout, whole or not at all."""
    if ctx.rank == 0:
        algorithm, lora = recipe.algorithm, recipe.policy.lora
        facts = RewardFacts(
            algorithm.objective,
            algorithm.read,
            pad,
            recipe.data.train[0].step_separator,
            scores.get("mean"),
            scores.get("std"),
        )
        merge = lora is not None and lora.merge_final
        ctx.run.commit_final(lambda place: export_reward_model(model, recipe.policy, facts, place, merge))
    barrier()
