"""Estimates of KL(policy || reference) from the tokens that the policy sampled.

    d = log pi(y_t) - log pi_ref(y_t),   y_t sampled from pi
    k1 = d                   unbiased, high variance, may be negative
    k2 = d^2 / 2             biased, low variance; its gradient is the unbiased gradient of the KL
    k3 = exp(-d) - 1 + d     unbiased, never negative, low variance while the two are close

Source: Schulman, "Approximating KL Divergence" (2020, joschu.net/blog/kl-approx.html); k3 is eq. 4 of GRPO,
arXiv 2402.03300. Shapes: any, the two alike. Units: nats per token.

1. The first argument is the distribution that was sampled from. kl(policy, reference) for the penalty,
   kl(sampler, trainer) for the gap between rollout and trainer: then k1 and k3 are unbiased.
2. Nothing is clamped (OpenRLHF clamps at +-10 after the estimate, TRL does not): a clamp hides the divergence that the
   number is there to show. Tokens with |d| > 20 are counted instead, and the trainer warns.
3. As a penalty in the reward k1 is usual, in the loss k3. In the loss k1 has the right value and a useless gradient:
   its expectation under pi is zero.
4. k3 is computed as expm1(-d) + d: exp(-d) - 1 + d loses all digits for |d| < 1e-4 in float32.
5. Both arguments may carry gradients; the caller detaches the reference.
"""

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")
LARGE = 20.0  # nats: one token 485 million times likelier under one of the two


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate, same shape. logprobs: of the distribution that was sampled from.

    Raises ValueError on an unknown estimator.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kl_estimator is {estimator!r}: one of {', '.join(ESTIMATORS)}")


def kl_sums(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over the masked tokens (all, without a mask): tokens, k1, k2, k3, large (tokens with |d| > 20).

    logprobs, ref_logprobs, mask: one shape. Detached; sums add over micro-batches and ranks, k3 / tokens is the mean.
    """
    logprobs, ref_logprobs = logprobs.detach(), ref_logprobs.detach()
    if mask is not None:
        logprobs, ref_logprobs = logprobs[mask.bool()], ref_logprobs[mask.bool()]
    sums = {name: kl(logprobs, ref_logprobs, name).sum() for name in ESTIMATORS}
    large = ((logprobs - ref_logprobs).abs() > LARGE).sum()
    return {"tokens": torch.tensor(logprobs.numel()), **sums, "large": large}


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor, estimator: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty as a term of the loss, sum_i weights_i * kl_i; the caller multiplies by kl_coef.

    logprobs, ref_logprobs, weights: one shape; positions of weight 0 take no part. Returns the loss and `kl_sums`.
    """
    taken = weights != 0
    logprobs = torch.where(taken, logprobs, 0.0)
    ref_logprobs = torch.where(taken, ref_logprobs.detach(), 0.0)
    loss = (weights * kl(logprobs, ref_logprobs, estimator)).sum()
    return loss, kl_sums(logprobs, ref_logprobs, taken)
