"""The clipped policy loss of PPO.

    rho_t = exp(log pi(y_t) - log pi_old(y_t))
    s_t   = min( rho_t * A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) * A_t )
    s_t   = max( s_t, c * A_t )                where A_t < 0 and a dual clip c > 1 is given
    loss  = - sum_t w_t * is_t * s_t           is_t: importance weight of the sampler's mismatch, 1 without one

Papers: PPO, arXiv 1707.06347, eq. 7. Separate bounds: DAPO, arXiv 2503.14476, section 3.1 (clip-higher). Dual clip:
Ye et al., arXiv 1912.09729. Importance weights: `importance.py`.
Shapes: N tokens (or [B, T] padded, weights 0 on padding). Units: log-probabilities in nats, advantages in units of the
reward or whitened.

1. Weights carry the normaliser of the global batch (`masking.token_weights`): sums over micro-batches are the loss.
2. Only logprobs carry a gradient. old_logprobs, advantages and importance are detached here, so the first pass may hand
   in logprobs itself as old_logprobs: the ratio is 1 and the gradient is that of the plain policy gradient.
3. Inside the clip range and on its safe side (rho too high with A < 0, too low with A > 0) the gradient is A * rho;
   where the clip lowers the objective it is 0.
4. The clip fraction counts tokens whose objective the clip lowered (clipped < unclipped), as OpenRLHF and TRL do, not
   all tokens out of range.
5. The log-ratio is not clamped: a ratio past float32 gives a non-finite loss or gradient, and the trainer stops there.
6. Positions of weight 0 take no part: whatever stands there, NaN included, changes neither loss, gradient nor metrics.
7. kl_policy is the k3 estimate of KL(old || new), exp(l) - 1 - l with l = log rho, on tokens sampled from old.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """objective: s_t, to be maximised; clipped, dual_clipped (bool): where the clip, the dual clip changed it."""

    objective: Tensor
    clipped: Tensor
    dual_clipped: Tensor


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Surrogate:
    """s_t of one ratio and one advantage per token, all of one shape."""
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    surrogate = torch.min(unclipped, clipped)
    bounded = surrogate
    if dual_clip is not None:
        bounded = torch.where(advantages < 0, torch.max(surrogate, dual_clip * advantages), surrogate)
    return Surrogate(bounded, clipped < unclipped, bounded > surrogate)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a sum over the tokens at hand, and sums for the metrics.

    logprobs, old_logprobs, advantages, weights, importance: one shape, [N] or [B, T].
    Metrics, sums over tokens of non-zero weight: tokens, clipped, dual_clipped, ratio, kl_policy (nats).
    """
    log_ratio = torch.where(weights != 0, logprobs - old_logprobs.detach(), 0.0)
    clip = (clip_low, clip_high, dual_clip)
    loss, metrics, _ = loss_of_ratio(log_ratio.exp(), log_ratio, advantages, weights, clip, importance)
    return loss, metrics


def loss_of_ratio(
    ratio: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip: tuple[float, float, float | None],
    importance: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of tokens whose ratio is given, `policy_loss`'s metrics, and which tokens the clip lowered (bool).

    ratio carries the gradient; log_ratio: of each token, 0 where its weight is. clip: clip_low, clip_high, dual_clip.
    """
    taken = weights != 0
    surrogate = clipped_surrogate(ratio, torch.where(taken, advantages.detach(), 0.0), *clip)
    per_token = -surrogate.objective
    if importance is not None:
        per_token = per_token * torch.where(taken, importance.detach(), 0.0)
    with torch.no_grad():
        metrics = {
            "tokens": taken.sum(),
            "clipped": surrogate.clipped.sum(),
            "dual_clipped": surrogate.dual_clipped.sum(),
            "ratio": (ratio * taken).sum(),
            "kl_policy": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    return (weights * per_token).sum(), metrics, surrogate.clipped
