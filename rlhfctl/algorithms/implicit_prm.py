"""An implicit process reward model, learned online from outcomes alone, and the advantages it gives (PRIME).

The reward model is a language model pi_phi beside its own start pi_ref; its score of a response and of a token:

    r_t    = beta * (log pi_phi(y_t) - log pi_ref(y_t))        r(y) = sum_t r_t
    loss   = - [ o log sigmoid(r(y)) + (1 - o) log(1 - sigmoid(r(y))) ]        o in {0, 1}: the outcome
    A_t    = coef * sum_{s >= t} gamma^(s - t) (r_s - m)  +  R - M

m is the mean over the other samples of the prompt of their mean r per token; M the mean of their scores R: leave one
out on both parts. Source: Implicit PRM, arXiv 2412.01981; PRIME, arXiv 2502.01456, eq. 5. Shapes: B = groups * n
samples, those of one prompt side by side; T response tokens; mask [B, T]. Units: nats times beta; reward.

1. r_t is detached where it is a reward: pi_phi learns from outcomes only.
2. gamma is applied once per token of the policy; observations are stepped over.
3. A sample without a score (`valid` False) is left out of both baselines and has advantage 0; so has one that is alone.
"""

import torch
from torch import Tensor
from torch.nn import functional

from rlhfctl.algorithms.advantages import discounted_returns


def process_rewards(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t [B, T], 0 outside the mask, without gradient."""
    return torch.where(mask.bool(), beta * (logprobs - ref_logprobs), 0.0).detach()


def outcome_loss(
    logprobs: Tensor, ref_logprobs: Tensor, outcomes: Tensor, beta: float, total_samples: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats summed over the samples at hand, over total_samples (of the whole global batch).

    logprobs, ref_logprobs [B]: summed over each response's tokens; outcomes [B] 0 or 1. Metrics sums: right (samples on
    the right side of 0).
    """
    scores = beta * (logprobs - ref_logprobs.detach())
    loss = functional.binary_cross_entropy_with_logits(scores, outcomes, reduction="sum") / total_samples
    return loss, {"right": ((scores > 0) == (outcomes > 0.5)).sum().detach()}


def prime_advantages(
    process: Tensor, scores: Tensor, mask: Tensor, n: int, coef: float, gamma: float, valid: Tensor
) -> Tensor:
    """[B, T], 0 outside the mask. process [B, T]: r_t; scores [B]; valid [B] bool. Raises ValueError for n < 2 and for
    a B that n does not divide."""
    if n < 2 or len(scores) % n:
        raise ValueError(f"{len(scores)} scores do not form groups of n = {n} samples, n at least 2")
    mask = mask.bool() & valid.bool()[:, None]
    per_token = torch.where(mask, process, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    centred = torch.where(mask, process - _others(per_token, n, valid)[:, None], 0.0)
    outcome = scores - _others(scores, n, valid)
    together = coef * discounted_returns(centred, mask, gamma) + outcome[:, None]
    count = valid.view(-1, n).sum(1, keepdim=True).expand(-1, n).reshape(-1)
    return torch.where(mask & (count > 1)[:, None], together, 0.0)


def _others(values: Tensor, n: int, valid: Tensor) -> Tensor:
    """[B]: the mean over the other valid samples of the same group."""
    chosen = torch.where(valid.bool(), values, 0.0).view(-1, n)
    count = valid.view(-1, n).sum(1, keepdim=True)
    return ((chosen.sum(1, keepdim=True) - chosen) / (count - 1).clamp(min=1)).view(-1)
