"""Offline reasoning optimisation: value and policy losses from the soft Bellman equation of whole trajectories.

    l_t = log pi(a_t|s_t) - log pi_ref(a_t|s_t)        S_t = sum_{i >= t} l_i        R_t = sum_{i >= t} r_i
    value    1/|starts| * sum_{t in starts} ( V(s_t) - sg[ R_t - beta * S_t ] )^2                              eq. 8
    policy   1/K * sum_k ( sg[V(s_b)] - R_b + beta * sum_{i=b..e} l_i + sg[ beta * S_{e+1} ] )^2         eq. 9 and 10
             unit k covers the tokens b..e

Source: OREO, arXiv 2412.16145. At the optimum V(s_t) = R_t - beta * S_t for every t (its Theorems 1 and 2).
Shapes: B trajectories, T action tokens in order (prompt and observation tokens are not among them), mask [B, T] True on
actions. Units: nats and rewards.

1. A unit is a token, a step or the whole response: one number per token, equal inside a unit, ascending.
2. sg: V, pi_ref and every l_i behind the own unit are constants, so that a token's gradient is that of its own unit's
   residual alone: 2 * beta * residual / K. Without it early tokens would count once for every later one.
3. The value loss detaches all log-probabilities. With the same starts it is the same number as the policy loss.
4. There is no factor 1/2; the mean is over units first, then over trajectories, so long answers weigh no more.
5. S crosses observations, which are not actions: V(terminal) is 0 and nothing is trained there.
6. factors [B, T], where given, weigh the units of a trajectory: sum_k f_k x_k / sum_k f_k in place of the mean. They
   say which residuals matter more, not what is right: the optimum is the same. Not in the paper.
7. weights [B] hold 1 / trajectories of the global batch: losses of parts of a batch add up to the batch's.
"""

import torch
from torch import Tensor

LEVELS = ("token", "step", "response")


def suffix_sums(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> sum of x over the own and all later positions inside the mask."""
    return torch.where(mask, x, 0.0).flip(1).cumsum(1).flip(1)


def unit_starts(units: Tensor, mask: Tensor) -> Tensor:
    """bool [B, T]: the first token of each unit. units [B, T], int64."""
    first = torch.ones_like(mask)
    first[:, 1:] = (units[:, 1:] != units[:, :-1]) | ~mask[:, :-1]
    return first & mask


def units_of(level: str, steps: Tensor) -> Tensor:
    """What is one action at this level. steps [B, T]: the number of the step that each token belongs to."""
    if level == "token":
        return torch.arange(steps.shape[1], device=steps.device).expand_as(steps)
    if level == "step":
        return steps
    if level == "response":
        return torch.zeros_like(steps)
    raise ValueError(f"level is {level!r}: one of {', '.join(LEVELS)}")


def value_starts(level: str, steps: Tensor, mask: Tensor) -> Tensor:
    """Where V is trained: at step level the states that steps start in, else every state (eq. 10 keeps eq. 8)."""
    return unit_starts(units_of("step" if level == "step" else "token", steps), mask)


def value_targets(log_ratios: Tensor, returns: Tensor, mask: Tensor, beta: float) -> Tensor:
    """R_t - beta * S_t [B, T], without a gradient."""
    return returns.detach() - beta * suffix_sums(log_ratios.detach(), mask)


def value_loss(
    values: Tensor, targets: Tensor, starts: Tensor, weights: Tensor, factors: Tensor | None = None
) -> Tensor:
    """values, targets, factors [B, T]; starts [B, T] bool; weights [B] -> scalar."""
    error = torch.where(starts, values - targets.detach(), 0.0)
    return (_per_unit(starts, weights, factors) * error.square()).sum()


def step_factors(table: Tensor, steps: Tensor) -> Tensor:
    """[B, T]: table[k] for the tokens of step k, its last entry for all later steps. table [K], steps [B, T] int64."""
    return table[steps.clamp(max=len(table) - 1)]


def policy_loss(
    log_ratios: Tensor,
    values: Tensor,
    returns: Tensor,
    units: Tensor,
    mask: Tensor,
    weights: Tensor,
    beta: float,
    factors: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """log_ratios [B, T] with the policy's gradient; values, returns [B, T] of the states before each token.

    Returns the loss and sums: units, residual (sum over the units), absolute residual.
    """
    taken = torch.where(mask, log_ratios, 0.0)
    # The sum over each unit with its gradient, minus itself: adds the gradient of the own unit to the constant S_b.
    sums = torch.zeros_like(taken).scatter_add(1, torch.where(mask, units, 0), taken)
    gradient = (sums - sums.detach()).gather(1, torch.where(mask, units, 0))
    starts = unit_starts(units, mask)
    reached = suffix_sums(log_ratios.detach(), mask) + gradient
    residual = torch.where(starts, values.detach() - returns.detach() + beta * reached, 0.0)
    loss = (_per_unit(starts, weights, factors) * residual.square()).sum()
    with torch.no_grad():
        metrics = {"units": starts.sum(), "residual": residual.sum(), "absolute": residual.abs().sum()}
    return loss, metrics


def token_mean(per_token: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Mean over a trajectory's tokens, weighted over trajectories: the KL regulariser. per_token [B, T] -> scalar."""
    return (_per_unit(mask, weights) * torch.where(mask, per_token, 0.0)).sum()


def _per_unit(starts: Tensor, weights: Tensor, factors: Tensor | None = None) -> Tensor:
    """weights [B] shared out over the units of each trajectory: [B, 1], or [B, T] by their factors."""
    if factors is None:
        return (weights / starts.sum(1).clamp(min=1))[:, None]
    shares = torch.where(starts, factors, 0.0)
    return weights[:, None] * shares / shares.sum(1, keepdim=True).clamp(min=1e-30)
