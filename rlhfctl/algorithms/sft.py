"""Cross-entropy on the trained tokens: what supervised fine-tuning minimises.

    loss = - sum_i w_i * log pi(y_i | prompt, y_<i)            w_i = 1 / trained tokens of the global batch

Paper: InstructGPT, arXiv 2203.02155, section 3.5 (maximum likelihood on demonstrations).
Shapes: N trained tokens (or [B, T] padded, weights 0 on padding). Units: nats.

1. The mean is over all trained tokens of the global batch, so a long answer counts by its length and the split into
   micro-batches does not matter (a mean of micro-batch means would weigh short micro-batches more).
2. Positions of weight 0 take no part: whatever stands there, NaN included, changes neither loss, gradient nor metrics.
3. The trainer uses `models.head.weighted_nll`, which fuses this sum with the head; a test holds the two equal.
"""

import torch
from torch import Tensor


def cross_entropy(logprobs: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted negative log-likelihood.

    logprobs: log-probabilities of the target tokens, in nats; weights: same shape, from `masking.token_weights`.
    Returns the loss (a sum) and sums over trained tokens: tokens, nll (nats, unweighted).
    """
    taken = weights != 0
    nll = -torch.where(taken, logprobs, 0.0)
    metrics = {"tokens": taken.sum(), "nll": nll.detach().sum()}
    return (weights * nll).sum(), metrics
