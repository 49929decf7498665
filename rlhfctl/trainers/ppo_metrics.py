"""Metrics of a batch of experience."""

import statistics

import torch

from rlhfctl.algorithms.kl import LARGE, kl
from rlhfctl.algorithms.value import explained_variance, explained_variance_sums
from rlhfctl.trainers.experience import Experience


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
        metrics["kl/large_fraction"] = float((per_token.abs() > LARGE).sum()) / tokens
        metrics["kl/coef"] = experience.kl_coef
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
