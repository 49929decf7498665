"""Rewards of steps from a process reward model's probabilities that each step is right.

P_1..P_K, P_k = sigmoid(logit) at the end of step k:

    raw          r_k = P_k                              sums grow with the number of steps: more steps, more reward
    difference   r_k = P_k - P_{k-1},   P_0 = 0         telescopes to P_K: potential-based, steps add nothing by number
    min          r_k = M_k - M_{k-1},   M_0 = 0         M_k = min(P_1..P_k); telescopes to the weakest step, which is
                                                        the score of an answer (Math-Shepherd, arXiv 2312.08935)

Potential-based shaping: Ng, Harada, Russell (1999). Shapes: K steps of one response. Units: probability.

1. P_0 = 0 and not 1/2: with it the sum is the last, or lowest, probability itself. The offset is the same for every
   response to a prompt, so it changes no comparison of responses that have a step.
"""

import torch
from torch import Tensor

STEP_REWARDS = ("difference", "raw", "min")


def step_rewards(logits: Tensor, form: str) -> Tensor:
    """[K] from logits [K]. Raises ValueError on an unknown form."""
    probabilities = torch.sigmoid(logits)
    if form == "raw":
        return probabilities
    if form == "min":
        probabilities = probabilities.cummin(0).values if len(probabilities) else probabilities
    elif form != "difference":
        raise ValueError(f"form is {form!r}: one of {', '.join(STEP_REWARDS)}")
    return torch.diff(probabilities, prepend=torch.zeros_like(probabilities[:1]))
