"""A KL coefficient that steers towards a target.

    e_k     = clip( (KL_k - target) / target, -0.2, 0.2 )
    coef'   = coef * (1 + e_k * samples / horizon)

Paper: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section 2.2, in the form
of its code (a factor of samples / horizon instead of the constant .1). Units: KL and target in nats per response token;
samples and horizon in samples.

1. KL_k is the mean k1 estimate over the response tokens of the step's batch; it is noisy, and may be negative.
2. The error is clipped, so the coefficient moves by at most 20 % per horizon, however far away the target is.
3. The coefficient of step k + 1 follows from the KL of step k: it is part of a checkpoint.
4. A KL that is not finite would make the coefficient so for good: it is refused.
"""

import math

LIMIT = 0.2


def adapted_coef(coef: float, kl: float, target: float, horizon: int, samples: int) -> float:
    """The coefficient of the next step. Raises ValueError where the KL is not finite."""
    if not math.isfinite(kl):
        raise ValueError(f"the KL to the reference is {kl}: no coefficient follows from it")
    error = min(max((kl - target) / target, -LIMIT), LIMIT)
    return max(coef * (1.0 + error * samples / horizon), 0.0)
