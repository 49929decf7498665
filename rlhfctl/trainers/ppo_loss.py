"""The losses of one packed forward pass: policy, KL term, entropy bonus and value, with the sums their metrics need."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhfctl.algorithms.gspo import sequence_policy_loss
from rlhfctl.algorithms.importance import banded_weights, sequence_mask, truncated_weights
from rlhfctl.algorithms.kl import kl, kl_loss
from rlhfctl.algorithms.ppo import policy_loss
from rlhfctl.algorithms.value import value_loss
from rlhfctl.models.head import token_logprobs
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors
from rlhfctl.models.packing import Pack
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.trainers.experience import Experience
from rlhfctl.trainers.ppo_models import PpoModels

NAMES = (
    "tokens",
    "skipped",
    "rollout_tokens",
    "kl_rollout",
    "policy_loss",
    "clipped",
    "dual_clipped",
    "sequences",
    "sequences_clipped",
    "kl_policy",
    "entropy",
    "entropy_loss",
    "kl_loss",
    "value_loss",
    "value_clipped",
    "importance",
    "importance_capped",
    "importance_masked",
)


@dataclass(slots=True)
class Sums:
    """Sums over this rank's tokens; the trainer adds ranks up and divides once. Every rank has all names."""

    values: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))

    def add(self, name: str, value: float | Tensor) -> None:
        self.values[name] += float(value.detach()) if isinstance(value, Tensor) else float(value)


@dataclass(frozen=True, slots=True)
class Pass:
    """first: no optimizer step has been made since the rollout; warming: the policy stands still."""

    first: bool
    warming: bool


def train_pack(
    algorithm: Algorithm,
    models: PpoModels,
    experience: Experience,
    batch: Pack,
    weights: Tensor,
    sums: Sums,
    stage: Pass,
) -> None:
    """Forward and backward for the policy, and for the critic (together with a shared trunk)."""
    critic = models.critic

    def value_terms(values: Tensor) -> Tensor:
        assert experience.values is not None
        assert experience.returns is not None
        fit, stats = value_loss(
            values,
            flat(experience.values, experience.mask, batch),
            flat(experience.returns, experience.mask, batch),
            weights,
            algorithm.value_clip,
        )
        sums.add("value_loss", fit)
        sums.add("value_clipped", stats["clipped"])
        return fit

    def policy_pass() -> Tensor:
        with torch.set_grad_enabled(not stage.warming):
            hidden = hidden_at_predictors(backbone(models.policy), batch)
            logprobs, entropy = token_logprobs(
                hidden, head_weight(models.policy), batch.targets, models.temperature
            )
            loss = policy_terms(algorithm, experience, batch, logprobs, entropy, weights, sums, stage.first)
        if critic is None or not critic.shares_hidden:
            return loss
        fit = algorithm.value_coef * value_terms(critic.head(hidden))
        return fit if stage.warming else loss + fit

    loss = models.policy_passes.run(policy_pass)
    if loss.requires_grad:
        models.policy_passes.backward(loss)  # frees the policy's graph before the critic's is built
    if critic is not None and not critic.shares_hidden and experience.value_sums is None:
        fit = models.critic_passes.run(lambda: value_terms(models.values(batch)))
        with critic.acting():
            models.critic_passes.backward(fit)


def flat(padded: Tensor, mask: Tensor, batch: Pack) -> Tensor:
    """[B, T] -> the pack's trained positions [N]."""
    parts = [padded[row, mask[row]] for row in batch.rows]
    return torch.cat(parts).to(batch.ids.device)


def policy_terms(
    algorithm: Algorithm,
    experience: Experience,
    batch: Pack,
    logprobs: Tensor,
    entropy: Tensor,
    weights: Tensor,
    sums: Sums,
    first: bool,
) -> Tensor:
    """The policy's loss: clipped or sequence-level, plus the KL term, minus the entropy bonus."""
    rollout_logprobs = flat(experience.rollout_logprobs, experience.mask, batch)
    if first:
        # In the order of who drew the tokens: the sampler.
        sums.add("kl_rollout", kl(rollout_logprobs, logprobs.detach(), "k3").sum())
        sums.add("rollout_tokens", len(batch.targets))
    if not experience.old_known:
        for row, part in zip(batch.rows, logprobs.detach().cpu().split(batch.counts), strict=True):
            experience.old_logprobs[row, experience.mask[row]] = part
    old_logprobs = flat(experience.old_logprobs, experience.mask, batch)
    lengths = torch.tensor(batch.counts)
    importance = importance_of(algorithm, old_logprobs, rollout_logprobs, lengths, sums)
    advantages = flat(experience.advantages, experience.mask, batch)
    low, high = algorithm.clip_epsilon, algorithm.clip_epsilon_high or algorithm.clip_epsilon
    if algorithm.loss == "gspo":
        loss, stats = sequence_policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            weights,
            lengths,
            low,
            high,
            algorithm.dual_clip,
            importance,
        )
        sums.add("sequences", stats["sequences"])
        sums.add("sequences_clipped", stats["sequences_clipped"])
    else:
        loss, stats = policy_loss(
            logprobs, old_logprobs, advantages, weights, low, high, algorithm.dual_clip, importance
        )
    sums.add("policy_loss", loss)
    for name in ("clipped", "dual_clipped", "kl_policy"):
        sums.add(name, stats[name])
    sums.add("entropy", entropy.sum())
    sums.add("tokens", len(batch.targets))
    if experience.ref_logprobs is not None and algorithm.kl_in == "loss":
        reference = flat(experience.ref_logprobs, experience.mask, batch)
        estimate, _ = kl_loss(logprobs, reference, weights, algorithm.kl_estimator or "k3")
        loss = loss + experience.kl_coef * estimate
        sums.add("kl_loss", experience.kl_coef * estimate)
    if algorithm.entropy_coef > 0:
        bonus = algorithm.entropy_coef * (weights * entropy).sum()
        loss = loss - bonus
        sums.add("entropy_loss", -bonus)
    return loss


def importance_of(
    algorithm: Algorithm, old_logprobs: Tensor, rollout_logprobs: Tensor, lengths: Tensor, sums: Sums
) -> Tensor | None:
    """The weights of the tokens by `algorithm.importance_correction`; None without a correction."""
    correction = algorithm.importance_correction
    if correction == "none":
        return None
    low, high = algorithm.bounds
    if correction == "icepop":
        weights, found = banded_weights(old_logprobs, rollout_logprobs, low, high)
        sums.add("importance_masked", found["masked"])
    else:
        weights, found = truncated_weights(old_logprobs, rollout_logprobs, algorithm.importance_cap)
        sums.add("importance_capped", found["capped"])
        if correction == "sequence_mask":
            kept = sequence_mask(old_logprobs, rollout_logprobs, lengths, low, high)
            weights = weights * kept
            sums.add("importance_masked", (~kept).sum())
    sums.add("importance", weights.sum())
    return weights
