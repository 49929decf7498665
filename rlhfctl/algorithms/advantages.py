"""Advantages without a value model: group baselines over the samples of a prompt, and discounted returns.

Scores r_1..r_n of the n samples of one prompt; one advantage for all tokens of a sample:

    rloo                  A_i = r_i - (sum_j r_j - r_i) / (n - 1)       arXiv 2402.14740, section 4 (leave one out)
    reinforce_baseline    A_i = r_i - mean(r)                           REINFORCE++-baseline, arXiv 2501.03262, which
                                                                        whitens it over the global batch (`gae.whiten`)
    dr_grpo               A_i = r_i - mean(r)                           Dr. GRPO, arXiv 2503.20783, section 3.2
    grpo                  A_i = (r_i - mean(r)) / (std(r) + eps)        GRPO, arXiv 2402.03300, section 4.1.2
    reinforce             A_t = G_t = r_t + gamma * G_{t+1}             per token: `discounted_returns`

Shapes: B = groups * n samples, those of one prompt side by side; T response tokens. Units: reward (grpo: standard
deviations of the group).

1. std is the unbiased one (n - 1), as torch.std in OpenRLHF and TRL; eps is added to it (OpenRLHF 1e-9, TRL 1e-4).
2. A group whose scores are all equal carries no gradient: its advantages are exactly 0, not rounding noise over eps,
   and the group is counted.
3. A sample without a score (its reward failed, or it was dropped) is left out by `valid`: its advantage is 0 and the
   statistics are those of the rest. A group with fewer than two scores has no baseline and counts as zero-variance.
4. rloo is n / (n - 1) times dr_grpo; the difference is the step size, not the direction.
5. reinforce skips observation tokens as `gae` does: gamma is applied once per token of the policy.
"""

import torch
from torch import Tensor

from rlhfctl.algorithms.masking import refuse_outside

GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_baseline")


def group_advantages(
    scores: Tensor, n: int, estimator: str, std_eps: float, valid: Tensor | None = None
) -> tuple[Tensor, int]:
    """Advantages [B] and the number of groups that carry no gradient.

    scores [B]: B / n groups of n neighbours; valid [B] bool: which samples have a score, default all.
    Raises ValueError on an unknown estimator, n < 2, B not divisible by n, and a valid score that is not finite.
    """
    if estimator not in GROUP_ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}: one of {', '.join(GROUP_ESTIMATORS)}")
    if n < 2 or scores.numel() % n:
        raise ValueError(f"{scores.numel()} scores do not form groups of n = {n} samples, n at least 2")
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.bool()
    if not bool(torch.isfinite(scores[valid]).all()):
        raise ValueError("a score is not finite: leave out samples whose reward failed")
    valid = valid.view(-1, n)
    groups = torch.where(valid, scores.view(-1, n), 0.0)
    count = valid.sum(1, keepdim=True)
    total = groups.sum(1, keepdim=True)
    centred = groups - total / count.clamp(min=1)
    others = (count - 1).clamp(min=1)
    if estimator == "rloo":
        advantages = groups - (total - groups) / others
    elif estimator == "grpo":
        variance = torch.where(valid, centred, 0.0).square().sum(1, keepdim=True) / others
        advantages = centred / (variance.sqrt() + std_eps)
    else:
        advantages = centred
    lowest = torch.where(valid, groups, torch.inf).amin(1)
    highest = torch.where(valid, groups, -torch.inf).amax(1)
    flat = lowest >= highest  # also true of groups without any valid sample
    advantages = torch.where(valid & ~flat[:, None], advantages, 0.0)
    return advantages.view(-1), int(flat.sum())


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} over masked tokens: [B, T], 0 outside the mask.

    rewards, mask: [B, T]. Raises ValueError where a reward stands outside the mask: it would be lost.
    """
    mask = mask.bool()
    refuse_outside(rewards, mask)
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        current = rewards[:, t] + gamma * following
        returns[:, t] = torch.where(here, current, 0.0)
        following = torch.where(here, current, following)
    return returns
