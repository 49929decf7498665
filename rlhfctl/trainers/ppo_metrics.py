"""Metrics of a batch of experience, and the watch that stops a run which learns nothing or drifts away."""

import statistics

import torch

from rlhfctl.algorithms.kl import kl
from rlhfctl.algorithms.value import explained_variance, explained_variance_sums
from rlhfctl.errors import RunFailed
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.experience import Experience

STEPS_WITHOUT_SIGNAL = 20  # consecutive steps with nothing to learn from before the run stops


def batch_metrics(experience: Experience) -> dict[str, float]:
    """Computed on every rank from the same global batch."""
    mask = experience.mask
    tokens = float(mask.sum())
    trajectories = experience.trajectories
    lengths = [float(length) for length in experience.response_lengths]
    advantages = experience.advantages
    mean = float((advantages * mask).sum()) / tokens
    rewards = [trajectory.shaped for trajectory in trajectories]
    metrics = {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "advantage/mean": mean,
        "advantage/std": float((((advantages - mean) * mask) ** 2).sum() / tokens) ** 0.5,
        "length/response": statistics.fmean(lengths),
        "length/prompt": statistics.fmean(len(trajectory.prompt_ids) for trajectory in trajectories),
        "length/truncated_fraction": statistics.fmean(
            float(trajectory.truncated) for trajectory in trajectories
        ),
        "samples": float(len(trajectories)),
    }
    if experience.ref_logprobs is not None:
        per_token = torch.where(mask, kl(experience.old_logprobs, experience.ref_logprobs, "k1"), 0.0)
        metrics["kl/reference"] = float(per_token.sum()) / tokens
        metrics["kl/reference_sequence"] = float(per_token.sum(1).mean())
    if experience.values is not None and experience.returns is not None:
        sums = explained_variance_sums(experience.values, experience.returns, mask)
        metrics["value/explained_variance"] = explained_variance(sums)
        metrics["value/mean"] = float((experience.values * mask).sum()) / tokens
        metrics["returns/mean"] = sums["returns"] / tokens
    dense = [t.token_rewards.sum() for t in trajectories if t.token_rewards is not None]
    if dense:
        metrics["reward/token_mean"] = float(torch.stack(dense).sum()) / tokens
        metrics["reward/sum_error"] = experience.sum_error
    if experience.groups:
        metrics["groups/zero_variance_fraction"] = experience.zero_variance_groups / experience.groups
    return metrics


class Watch:
    """Warns when a step carries no signal, stops when many in a row do, or when the KL limit is passed."""

    def __init__(self, ctx: RunContext, recipe: PpoRecipe) -> None:
        self.ctx = ctx
        self.limit = recipe.algorithm.kl_limit
        self.silent_steps = 0

    def check(self, step: int, metrics: dict[str, float], experience: Experience) -> None:
        cause = self._no_signal(metrics, experience)
        if cause:
            self.silent_steps += 1
            if self.silent_steps == 1:
                self.ctx.say(f"warning: step {step}: {cause}: nothing to learn from in this step")
            if self.silent_steps >= STEPS_WITHOUT_SIGNAL:
                raise RunFailed(
                    f"stopped at step {step}: {cause} for {self.silent_steps} steps in a row; "
                    "look at samples.jsonl (train.samples_every=1) and at the reward"
                )
        else:
            self.silent_steps = 0
        drift = metrics.get("kl/reference")
        if self.limit is not None and drift is not None and drift > self.limit:
            raise RunFailed(
                f"stopped at step {step}: kl/reference {drift:.3g} passed algorithm.kl_limit {self.limit:g}; "
                "raise algorithm.kl_coef or lower optim.lr"
            )

    def _no_signal(self, metrics: dict[str, float], experience: Experience) -> str | None:
        if experience.groups and experience.zero_variance_groups == experience.groups:
            return "all samples of every prompt have the same reward"
        dense = "reward/token_mean" in metrics  # tokens may differ where the scores of responses do not
        if metrics["reward/std"] == 0.0 and not dense and len(experience.trajectories) > 1:
            return f"all rewards are equal ({metrics['reward/mean']:g})"
        if not torch.any(experience.advantages != 0):
            return "all advantages are zero"
        return None
