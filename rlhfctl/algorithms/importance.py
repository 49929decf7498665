"""Truncated importance sampling: correct for a sampler whose probabilities are not the trainer's.

    w_t = min( exp(log pi_old(y_t) - log q(y_t)), cap )        q: the sampler that drew y_t

A rollout engine of other kernels, precision or older weights draws from q, not from pi_old. The policy loss of each
token is multiplied by w_t; the PPO ratio keeps pi_old below, so the clip still measures how far this step has moved.

Sources: Ionides, "Truncated Importance Sampling" (2008); for sampler and trainer of language models: Yao et al., "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025), token level, cap 2.
Shapes: N tokens or [B, T] with a mask. Units: log-probabilities in nats.

1. Detached: the weight says how much a token counts, it is not optimised.
2. Capped above only: a bound on the variance at the price of a bias; a weight below 1 is kept.
3. The gap itself, kl/rollout, is `kl.kl_sums(rollout_logprobs, old_logprobs)`, k3 / tokens, in that order: the tokens
   were drawn from the sampler.
"""

import torch
from torch import Tensor


def truncated_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float, mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of the same shape, 0 outside the mask, and sums over masked tokens: tokens, capped, weight.

    old_logprobs: the trainer's, with the weights of the rollout; rollout_logprobs: the sampler's. mask: default all.
    """
    mask = torch.ones_like(old_logprobs, dtype=torch.bool) if mask is None else mask.bool()
    raw = (old_logprobs.detach() - rollout_logprobs.detach()).exp()
    weights = torch.where(mask, raw.clamp(max=cap), 0.0)
    metrics = {"tokens": mask.sum(), "capped": ((raw > cap) & mask).sum(), "weight": weights.sum()}
    return weights, metrics
