"""The sequence-level policy loss of GSPO: one ratio for a whole response.

    s_i  = exp( mean over the tokens of response i of log pi(y_t) - log pi_old(y_t) )
    o_t  = min( s_i * A_t, clip(s_i, 1 - clip_low, 1 + clip_high) * A_t )
    o_t  = max( o_t, c * A_t )                 where A_t < 0 and a dual clip c > 1 is given
    loss = - sum_t w_t * is_t * o_t            is_t: importance weight of the sampler's mismatch, 1 without one

Paper: GSPO, arXiv 2507.18071, eq. 5 and 7. Shapes: B responses, N tokens of all responses end to end. Units:
log-probabilities in nats, advantages in units of the reward or whitened.

1. With the sequence mean of `masking.token_weights` and one advantage per response this is eq. 5: the weights of a
   response's tokens add up to 1 / samples. Other weights weigh responses by their tokens.
2. The gradient goes through s_i to all tokens of the response alike: d s_i / d logp_t = s_i / tokens of i. A clipped
   response has no gradient at all.
3. The mean makes s_i a geometric mean: its useful clip is a thousandth of the token ratio's (the paper: 3e-4 and 4e-4).
4. Only logprobs carry a gradient, and positions of weight 0 take no part, in the mean of s_i neither (as in `ppo.py`).
5. The log-ratio is not clamped: a ratio past float32 gives a non-finite loss or gradient, and the trainer stops there.
"""

import torch
from torch import Tensor

from rlhfctl.algorithms.ppo import loss_of_ratio


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    lengths: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a sum over the responses at hand, and sums for the metrics.

    logprobs, old_logprobs, advantages, weights, importance: [N]; lengths [B]: tokens of each response, N = their sum.
    Metrics, sums over tokens of non-zero weight, as of `ppo.policy_loss`: tokens, clipped and dual_clipped (tokens of
    such responses), ratio (s_i once a token), kl_policy (nats); over responses with such tokens: sequences,
    sequences_clipped.
    """
    taken = weights != 0
    lengths = lengths.to(logprobs.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), lengths)
    log_ratio = torch.where(taken, logprobs - old_logprobs.detach(), 0.0)
    empty = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=logprobs.device)
    tokens = empty.index_add(0, owner, taken.to(log_ratio.dtype))
    mean = empty.index_add(0, owner, log_ratio) / tokens.clamp(min=1)
    ratio = mean.exp()[owner]
    clip = (clip_low, clip_high, dual_clip)
    loss, metrics, clipped = loss_of_ratio(ratio, log_ratio, advantages, weights, clip, importance)
    with torch.no_grad():
        metrics["sequences"] = (tokens > 0).sum()
        metrics["sequences_clipped"] = (empty.index_add(0, owner, clipped.to(empty.dtype)) > 0).sum()
    return loss, metrics
