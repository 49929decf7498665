"""The optimizer steps of a ppo step: epochs of minibatches over one batch of experience."""

import math
import random

import torch

from rlhfctl.algorithms.masking import per_token, token_weights
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import gather_lists, sum_over_ranks
from rlhfctl.trainers.engine import passes
from rlhfctl.trainers.experience import Experience, sharing_of
from rlhfctl.trainers.logbook import refuse_non_finite
from rlhfctl.trainers.optimizer import Learner, clip_and_step
from rlhfctl.trainers.ppo_loss import Pass, Sums, train_pack
from rlhfctl.trainers.ppo_models import PpoModels


def minibatches(rows: int, count: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """`count` near-equal parts of range(rows), shuffled by (seed, step, epoch) alone."""
    order = list(range(rows))
    random.Random(f"rlhfctl minibatches {seed} {step} {epoch}").shuffle(order)
    count = min(count, rows)
    return [order[rows * part // count : rows * (part + 1) // count] for part in range(count)]


def update(
    ctx: RunContext,
    recipe: PpoRecipe,
    models: PpoModels,
    optimizers: dict[str, Learner],
    experience: Experience,
    step: int,
) -> dict[str, float]:
    """Train on the batch; returns the step's metrics."""
    algorithm = recipe.algorithm
    warming = step - ctx.first < algorithm.value_warmup_steps
    optimizers["policy"].held = "policy." if warming else None
    sums = Sums()
    for name, value in (experience.value_sums or {}).items():
        sums.add(name, value)
    norms: dict[str, list[float]] = {name: [] for name in optimizers}
    for epoch in range(algorithm.ppo_epochs):
        parts = minibatches(len(experience.trajectories), algorithm.minibatches, recipe.seed, step, epoch)
        for part, rows in enumerate(parts):
            # Before the first optimizer step the trainer's model is the sampler's: what differs then is the sampler.
            stage = Pass(first=epoch == 0 and part == 0, warming=warming)
            train_minibatch(ctx, recipe, models, experience, rows, sums, stage)
            found = clip_and_step(list(optimizers.values()), recipe.optim.max_grad_norm)
            for name, norm in zip(optimizers, found, strict=True):
                refuse_non_finite(step + 1, "grad_norm" if name == "policy" else "grad_norm/value", norm)
                norms[name].append(norm)
    metrics = update_metrics(algorithm, sum_over_ranks(sums.values), norms)
    if algorithm.value_warmup_steps:
        metrics["value/warmup"] = float(warming)
    for name in ("loss/policy", "loss/value"):
        if name in metrics:
            refuse_non_finite(step + 1, name, metrics[name])
    return metrics


def update_metrics(
    algorithm: Algorithm, total: dict[str, float], norms: dict[str, list[float]]
) -> dict[str, float]:
    """Means over all passes and ranks. total: Sums added up over ranks."""
    updates = len(norms["policy"])

    def mean(name: str, over: str = "tokens") -> float:
        return total[name] / total[over] if total[over] else math.nan

    metrics = {
        "loss/policy": total["policy_loss"] / updates,
        "clip/fraction": mean("clipped"),
        "kl/policy": mean("kl_policy"),
        "kl/rollout": mean("kl_rollout", "rollout_tokens"),
        "entropy": mean("entropy"),
        "grad_norm": sum(norms["policy"]) / updates,
    }
    if algorithm.dual_clip is not None:
        metrics["clip/dual_fraction"] = mean("dual_clipped")
    if algorithm.loss == "gspo":
        metrics["clip/sequence_fraction"] = mean("sequences_clipped", "sequences")
    if algorithm.advantage == "gae":
        metrics["loss/value"] = total["value_loss"] / updates
        metrics["value/clip_fraction"] = mean("value_clipped")
    if algorithm.kl_coef > 0 and algorithm.kl_in == "loss":
        metrics["loss/kl"] = total["kl_loss"] / updates
    if algorithm.entropy_coef > 0:
        metrics["loss/entropy"] = total["entropy_loss"] / updates
    if algorithm.importance_correction != "none":
        metrics["importance/mean"] = mean("importance")
        if algorithm.importance_correction != "icepop":
            metrics["importance/capped_fraction"] = mean("importance_capped")
        if algorithm.importance_correction != "tis":
            metrics["importance/masked_fraction"] = mean("importance_masked")
    if algorithm.advantage != "gae":
        everything = total["tokens"] + total["skipped"]
        metrics["groups/skipped_tokens_fraction"] = total["skipped"] / everything
    if "critic" in norms:
        metrics["grad_norm/value"] = sum(norms["critic"]) / updates
    return metrics


def with_gradient(
    algorithm: Algorithm, models: PpoModels, experience: Experience, rows: list[int]
) -> list[int]:
    """The rows whose forward pass can move a weight: without a value, KL or entropy term, advantages of 0 cannot."""
    others = models.critic is not None or algorithm.entropy_coef > 0
    others = others or (experience.ref_logprobs is not None and algorithm.kl_in == "loss")
    return rows if others else [row for row in rows if bool(experience.advantages[row].any())]


def train_minibatch(
    ctx: RunContext,
    recipe: PpoRecipe,
    models: PpoModels,
    experience: Experience,
    rows: list[int],
    sums: Sums,
    stage: Pass,
) -> None:
    """Forward and backward of this rank's share; the minibatch over all ranks is the unit of the mean, the rows that
    need no forward pass included."""
    algorithm, responses = recipe.algorithm, experience.response_lengths
    counts = torch.tensor([responses[row] for row in rows])
    weights = token_weights(
        counts, algorithm.loss_mean, int(counts.sum()), len(rows), recipe.rollout.max_new_tokens
    )
    weight_of = dict(zip(rows, weights.tolist(), strict=True))
    moving = with_gradient(algorithm, models, experience, rows)
    if ctx.rank == 0:
        sums.add("skipped", sum(responses[row] for row in set(rows) - set(moving)))
    sharing = sharing_of(experience.trajectories)
    packs = sharing.plan(moving, recipe.train.tokens_per_microbatch, ctx.rank, ctx.world)
    for members, counted in passes([models.policy_passes, models.critic_passes], packs):
        batch = sharing.pack(members, ctx.device, models.bucket)
        shares = torch.tensor([weight_of[row] if counted else 0.0 for row in batch.rows])
        token_weight = per_token(shares, torch.tensor(batch.counts)).to(ctx.device)
        found = sums if counted else Sums()
        train_pack(algorithm, models, experience, batch, token_weight, found, stage)
    if not experience.old_known:
        share_old_logprobs(experience, [row for members in packs for row in members])


def share_old_logprobs(experience: Experience, mine: list[int]) -> None:
    """Every rank learns what the first pass found for the others' rows; the batch stays the same on all."""
    for row, logprobs in gather_lists([(row, experience.old_logprobs[row].clone()) for row in mine]):
        experience.old_logprobs[row] = logprobs
    experience.old_known = True
