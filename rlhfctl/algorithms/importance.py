"""Importance weights: correct for a sampler whose probabilities are not the trainer's.

    d_t = log pi_old(y_t) - log q(y_t)                         q: the sampler that drew y_t

    tis             w_t = min( exp(d_t), cap )
    icepop          w_t = exp(d_t) where low <= exp(d_t) <= high, else 0
    sequence_mask   w_t = min( exp(d_t), cap ) where low <= exp(mean of d over the response) <= high, else 0

A rollout engine of other kernels, precision or older weights draws from q, not from pi_old. The policy loss of each
token is multiplied by w_t; the PPO ratio keeps pi_old below, so the clip still measures how far this step has moved.

Sources: Ionides, "Truncated Importance Sampling" (2008); for sampler and trainer of language models: Yao et al., "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025), token level, cap 2. icepop: Ling Team, "Every
Step Evolves", arXiv 2510.18855, bounds .5 and 5. Masks of whole responses by their mean: Liu et al., "When Speed Kills
Stability" (2025). Shapes: N tokens or [B, T] with a mask; of B responses end to end for sequence_mask. Units:
log-probabilities in nats.

1. Detached: the weight says how much a token counts, it is not optimised.
2. tis is capped above only: a bound on the variance at the price of a bias; a weight below 1 is kept. icepop takes
   tokens out on which sampler and trainer disagree, in both directions; sequence_mask takes out responses.
3. What is taken out stays in the denominator of the loss: a batch with much of it takes a smaller step.
4. The gap itself, kl/rollout, is `kl.kl_sums(rollout_logprobs, old_logprobs)`, k3 / tokens, in that order: the tokens
   were drawn from the sampler.
"""

import torch
from torch import Tensor


def truncated_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float, mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """tis: weights of the same shape, 0 outside the mask, and sums over masked tokens: tokens, capped, weight.

    old_logprobs: the trainer's, with the weights of the rollout; rollout_logprobs: the sampler's. mask: default all.
    """
    mask = torch.ones_like(old_logprobs, dtype=torch.bool) if mask is None else mask.bool()
    raw = (old_logprobs.detach() - rollout_logprobs.detach()).exp()
    weights = torch.where(mask, raw.clamp(max=cap), 0.0)
    metrics = {"tokens": mask.sum(), "capped": ((raw > cap) & mask).sum(), "weight": weights.sum()}
    return weights, metrics


def banded_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """icepop: weights of the same shape, and sums over tokens: tokens, masked (weight 0), weight."""
    ratio = (old_logprobs.detach() - rollout_logprobs.detach()).exp()
    inside = (ratio >= low) & (ratio <= high)
    weights = torch.where(inside, ratio, 0.0)
    return weights, {
        "tokens": torch.tensor(weights.numel()),
        "masked": (~inside).sum(),
        "weight": weights.sum(),
    }


def sequence_mask(
    old_logprobs: Tensor, rollout_logprobs: Tensor, lengths: Tensor, low: float, high: float
) -> Tensor:
    """bool [N]: the tokens of responses whose geometric mean ratio lies in [low, high].

    old_logprobs, rollout_logprobs: [N]; lengths [B]: tokens of each response, N = their sum.
    """
    log_ratio = old_logprobs.detach() - rollout_logprobs.detach()
    lengths = lengths.to(log_ratio.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=log_ratio.device), lengths)
    total = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=log_ratio.device)
    level = (total.index_add(0, owner, log_ratio) / lengths.clamp(min=1)).exp()
    return ((level >= low) & (level <= high))[owner]
