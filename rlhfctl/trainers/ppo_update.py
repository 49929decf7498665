"""The optimizer steps of a ppo step: epochs of minibatches over one batch of experience."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhfctl.algorithms.importance import truncated_weights
from rlhfctl.algorithms.kl import kl, kl_loss
from rlhfctl.algorithms.masking import per_token, token_weights
from rlhfctl.algorithms.ppo import policy_loss
from rlhfctl.algorithms.value import value_loss
from rlhfctl.models.head import token_logprobs
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors
from rlhfctl.models.packing import Pack, pack, plan_packs, split_over_ranks
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import sum_over_ranks
from rlhfctl.trainers.experience import Experience
from rlhfctl.trainers.logbook import refuse_non_finite
from rlhfctl.trainers.optimizer import Optimizer, clip_and_step
from rlhfctl.trainers.ppo_models import PpoModels


@dataclass(slots=True)
class Sums:
    """Sums over this rank's tokens; the trainer adds ranks up and divides once."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float | Tensor) -> None:
        self.values[name] = self.values.get(name, 0.0) + float(value)


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
    optimizers: dict[str, Optimizer],
    experience: Experience,
    step: int,
) -> dict[str, float]:
    """Train on the batch; returns the step's metrics."""
    algorithm = recipe.algorithm
    sums = Sums()
    norms: dict[str, list[float]] = {name: [] for name in optimizers}
    for epoch in range(algorithm.ppo_epochs):
        parts = minibatches(len(experience.trajectories), algorithm.minibatches, recipe.seed, step, epoch)
        for part, rows in enumerate(parts):
            # Before the first optimizer step the trainer's model is the sampler's: what differs then is the sampler.
            first = epoch == 0 and part == 0
            train_minibatch(ctx, recipe, models, experience, rows, sums, first)
            found = clip_and_step(list(optimizers.values()), recipe.optim.max_grad_norm)
            experience.old_known = True
            for name, norm in zip(optimizers, found, strict=True):
                refuse_non_finite(step + 1, "grad_norm" if name == "policy" else "grad_norm/value", norm)
                norms[name].append(norm)
    total = sum_over_ranks(sums.values)
    tokens, updates = total["tokens"], sum(1 for _ in norms["policy"])
    metrics = {
        "loss/policy": total["policy_loss"] / updates,
        "clip/fraction": total["clipped"] / tokens,
        "kl/policy": total["kl_policy"] / tokens,
        "kl/rollout": total["kl_rollout"] / max(1.0, total["rollout_tokens"]),
        "entropy": total["entropy"] / tokens,
        "grad_norm": sum(norms["policy"]) / updates,
    }
    if algorithm.dual_clip is not None:
        metrics["clip/dual_fraction"] = total["dual_clipped"] / tokens
    if "value_loss" in total:
        metrics["loss/value"] = total["value_loss"] / updates
        metrics["value/clip_fraction"] = total["value_clipped"] / tokens
    if "kl_loss" in total:
        metrics["loss/kl"] = total["kl_loss"] / updates
    if "importance" in total:
        metrics["importance/mean"] = total["importance"] / tokens
        metrics["importance/capped_fraction"] = total["importance_capped"] / tokens
    if "critic" in norms:
        metrics["grad_norm/value"] = sum(norms["critic"]) / updates
    for name in ("loss/policy", "loss/value"):
        if name in metrics:
            refuse_non_finite(step + 1, name, metrics[name])
    return metrics


def train_minibatch(
    ctx: RunContext,
    recipe: PpoRecipe,
    models: PpoModels,
    experience: Experience,
    rows: list[int],
    sums: Sums,
    first: bool,
) -> None:
    """Forward and backward of this rank's share; the minibatch over all ranks is the unit of the mean."""
    lengths = experience.lengths
    responses = experience.response_lengths
    counts = torch.tensor([responses[row] for row in rows])
    weights = token_weights(
        counts, recipe.algorithm.loss_mean, int(counts.sum()), len(rows), recipe.rollout.max_new_tokens
    )
    weight_of = dict(zip(rows, weights.tolist(), strict=True))
    mine = split_over_ranks(rows, lengths, ctx.world)[ctx.rank]
    for members in plan_packs(mine, lengths, recipe.train.tokens_per_microbatch):
        batch = pack(members, experience.ids, experience.trained, ctx.device, models.bucket)
        token_weight = per_token(
            torch.tensor([weight_of[row] for row in members]), torch.tensor(batch.counts)
        )
        train_pack(recipe, models, experience, batch, token_weight.to(ctx.device), sums, first)


def train_pack(
    recipe: PpoRecipe,
    models: PpoModels,
    experience: Experience,
    batch: Pack,
    weights: Tensor,
    sums: Sums,
    first: bool,
) -> None:
    """One packed forward and backward for the policy, and one for the critic (together with a shared trunk)."""
    algorithm = recipe.algorithm

    def flat(padded: Tensor) -> Tensor:
        """[B, T] -> the pack's trained positions [N]."""
        parts = [padded[row, experience.mask[row]] for row in batch.rows]
        return torch.cat(parts).to(batch.ids.device)

    hidden = hidden_at_predictors(backbone(models.policy), batch)
    logprobs, entropy = token_logprobs(hidden, head_weight(models.policy), batch.targets, models.temperature)
    rollout_logprobs = flat(experience.rollout_logprobs)
    if first:
        sums.add("kl_rollout", kl(logprobs.detach(), rollout_logprobs, "k3").sum())
        sums.add("rollout_tokens", len(batch.targets))
    if not experience.old_known:
        for row, part in zip(batch.rows, logprobs.detach().cpu().split(batch.counts), strict=True):
            experience.old_logprobs[row, experience.mask[row]] = part
    old_logprobs = flat(experience.old_logprobs)
    importance = None
    if algorithm.importance_correction == "tis":
        importance, found = truncated_weights(old_logprobs, rollout_logprobs, algorithm.importance_cap)
        sums.add("importance", found["weight"])
        sums.add("importance_capped", found["capped"])
    loss, stats = policy_loss(
        logprobs,
        old_logprobs,
        flat(experience.advantages),
        weights,
        algorithm.clip_epsilon,
        algorithm.clip_epsilon_high or algorithm.clip_epsilon,
        algorithm.dual_clip,
        importance,
    )
    sums.add("policy_loss", loss.detach())
    sums.add("clipped", stats["clipped"])
    sums.add("dual_clipped", stats["dual_clipped"])
    sums.add("kl_policy", stats["kl_policy"])
    sums.add("entropy", entropy.sum())
    sums.add("tokens", len(batch.targets))
    if experience.ref_logprobs is not None and algorithm.kl_in == "loss":
        estimate, _ = kl_loss(
            logprobs, flat(experience.ref_logprobs), weights, algorithm.kl_estimator or "k3"
        )
        sums.add("kl_loss", algorithm.kl_coef * estimate.detach())
        loss = loss + algorithm.kl_coef * estimate

    if models.critic is None:
        loss.backward()
        return
    if models.critic.trunk is None:
        values = models.critic.head(hidden)
    else:
        loss.backward()  # frees the policy's graph before the critic's is built
        values = models.values(batch)
    assert experience.values is not None
    assert experience.returns is not None
    fit, fit_stats = value_loss(
        values, flat(experience.values), flat(experience.returns), weights, algorithm.value_clip
    )
    sums.add("value_loss", fit.detach())
    sums.add("value_clipped", fit_stats["clipped"])
    if models.critic.trunk is None:
        (loss + algorithm.value_coef * fit).backward()
    else:
        fit.backward()
