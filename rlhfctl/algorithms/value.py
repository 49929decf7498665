"""The clipped value loss, and how much of the returns the value model explains.

    V'   = V_old + clip(V - V_old, -clip, clip)
    loss = 0.5 * sum_t w_t * max( (V_t - R_t)^2, (V'_t - R_t)^2 )

Source: the PPO2 code of OpenAI baselines, not the paper; the form of OpenRLHF, TRL and ReFT (arXiv 2401.08967).
Shapes: N tokens (or [B, T] padded, weights 0 on padding). Units: rewards; the loss is in rewards squared.

1. The maximum of the two, so that clipping can only make the loss larger: where V moved past the clip away from R the
   gradient stays, where it moved past the clip towards R it is 0.
2. clip None: the plain squared error. Clipping depends on the scale of the reward, so null is a sane choice.
3. Only values carry a gradient; old_values and returns are detached here.
4. Returns are fixed at rollout time (`gae.gae`), from the values of the rollout, and not whitened.
5. Explained variance is 1 - Var(R - V) / Var(R) over the response tokens of the global batch: 1 is perfect, 0 is a
   constant, below 0 is worse than a constant. Sums are float64, so that ranks may add theirs.
6. Positions of weight 0 take no part: whatever stands there, NaN included, changes neither loss, gradient nor metrics.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a sum over the tokens at hand, and sums over tokens of non-zero weight: tokens, clipped, squared_error.

    values, old_values, returns, weights: one shape, [N] or [B, T]. clipped counts tokens on which the clip changed the
    loss; squared_error is of the unclipped values.
    """
    taken = weights != 0
    values = torch.where(taken, values, 0.0)
    old_values = torch.where(taken, old_values.detach(), 0.0)
    returns = torch.where(taken, returns.detach(), 0.0)
    plain = (values - returns).square()
    worst, past = plain, torch.zeros_like(taken)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        worst = torch.max(plain, (near - returns).square())
        past = (values - old_values).abs() > clip  # inside, V' differs from V by rounding alone
    with torch.no_grad():
        clipped = (past & (worst > plain)).sum()
        metrics = {"tokens": taken.sum(), "clipped": clipped, "squared_error": plain.sum()}
    return 0.5 * (weights * worst).sum(), metrics


def explained_variance_sums(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
    """What `explained_variance` needs, to be added over ranks. values, returns, mask: one shape."""
    chosen = mask.bool()
    target = returns[chosen].double()
    error = target - values[chosen].double()
    return {
        "count": float(target.numel()),
        "returns": float(target.sum()),
        "returns_squares": float(target.square().sum()),
        "errors": float(error.sum()),
        "errors_squares": float(error.square().sum()),
    }


def explained_variance(sums: Mapping[str, float]) -> float:
    """1 - Var(R - V) / Var(R), from `explained_variance_sums`. NaN where the returns are all equal: it says nothing."""
    count = max(sums["count"], 1.0)
    spread = sums["returns_squares"] / count - (sums["returns"] / count) ** 2
    left = sums["errors_squares"] / count - (sums["errors"] / count) ** 2
    # A difference of sums: below this it is rounding of the returns' own size.
    if spread <= 1e-12 * sums["returns_squares"] / count:
        return float("nan")
    return 1.0 - max(left, 0.0) / spread
