"""Generalised advantage estimation over response tokens, and the whitening of advantages.

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t     = delta_t + gamma * lambda * A_{t+1}               V and A after the last token are 0
    R_t     = A_t + V_t                                        the target of the value loss

Paper: Schulman et al., arXiv 1506.02438, eq. 16. Shapes: B samples, T response tokens, right-padded; mask [B, T] is 1
on tokens that the policy produced. Units: rewards, values, advantages and returns are all in units of the reward.

1. Observation tokens (mask 0 between masked tokens, as in multi-turn conversations) are removed before the recursion:
   the token after a tool's answer is the next token, at one step of gamma and lambda. Setting values and rewards to
   zero in place instead, as OpenRLHF does, adds a factor gamma * lambda and a false V = 0 per observation token.
2. A response cut by max_new_tokens ends like any other: no value is bootstrapped behind it.
3. Returns are not whitened; advantages are, by `whiten`, over all tokens of the global batch with the population
   variance and 1e-8 under the root (ReFT, arXiv 2401.08967, reference code; REINFORCE++, arXiv 2501.03262).
4. The moments are sums in float64, so that ranks may add theirs and get the same numbers as one process.
5. Outside the mask everything returned is 0, whatever was there before, NaN included.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhfctl.algorithms.masking import refuse_outside

WHITEN_EPS = 1e-8


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages [B, T] and returns [B, T], 0 outside the mask.

    rewards, values, mask: [B, T]. Raises ValueError where a reward stands outside the mask: it would be lost.
    """
    mask = mask.bool()
    refuse_outside(rewards, mask)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(values.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        # Off the mask the carried numbers pass through: the recursion does not see that position.
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
    returns = torch.where(mask, advantages + values, 0.0)
    return advantages, returns


def whiten_sums(x: Tensor, mask: Tensor) -> dict[str, float]:
    """What `whiten` needs, to be added over ranks: count, sum and sum of squares over the masked entries."""
    chosen = x[mask.bool()].double()
    return {
        "count": float(chosen.numel()),
        "sum": float(chosen.sum()),
        "squares": float(chosen.square().sum()),
    }


def whiten(x: Tensor, mask: Tensor, sums: Mapping[str, float] | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over masked entries, 0 outside.

    x, mask: [B, T]. sums: of the whole global batch where x is a part of it; without them, of x.
    """
    sums = sums or whiten_sums(x, mask)
    count = max(sums["count"], 1.0)
    mean = sums["sum"] / count
    variance = max(sums["squares"] / count - mean**2, 0.0)
    scale = (variance + WHITEN_EPS) ** -0.5
    return torch.where(mask.bool(), (x.double() - mean) * scale, 0.0).to(x.dtype)
