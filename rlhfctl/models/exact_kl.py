"""Log-probabilities of the trained tokens and the exact KL to a reference, in chunks with a gradient.

    kl_i = sum_v pi_i(v) * ( log pi_i(v) - log ref_i(v) )    d kl_i / d z_v = pi(v) * (log pi(v) - log ref(v) - kl)

N positions, H hidden size, V vocabulary: the two [n, V] distributions of a chunk exist in float32, never all of them,
and what follows from them is written in their place; the backward pass computes them again. What is made of a chunk is
made in a function: its distributions are gone before those of the next one are there.
"""

from typing import Any

import torch
from torch import Tensor

from rlhfctl.models.head import chunk_logits, chunk_rows
from rlhfctl.models.linear import product

ROWS_ELEMENTS = 1 << 20  # of a chunk, normalised at a time: 4 MiB


class _LogprobsAndKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor, ref_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        ref_logprobs, kl = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for part in _chunks(len(targets), weight.shape[0]):
            logprobs[part], ref_logprobs[part], kl[part] = _values(
                hidden[part], weight, targets[part], ref_hidden[part], ref_weight
            )
        ctx.save_for_backward(hidden, weight, targets, ref_hidden, ref_weight, kl)
        ctx.mark_non_differentiable(ref_logprobs)
        return logprobs, ref_logprobs, kl

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, ref_hidden, ref_weight, kl = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(targets), weight.shape[0]):
            grad_logits = _logits_gradient(
                hidden[part], weight, targets[part], ref_hidden[part], ref_weight,
                kl[part], grad_logprobs[part], grad_kl[part],
            ).to(hidden.dtype)  # fmt: skip
            grad_hidden[part] = product(grad_logits, weight.t())
            if grad_weight is not None:
                grad_weight += product(grad_logits.t(), hidden[part].t())
            del grad_logits
        return grad_hidden, grad_weight, None, None, None


def _log_distributions(hidden: Tensor, weight: Tensor) -> Tensor:
    """[n, H] x [V, H] -> log-probabilities [n, V], in the memory of the logits: a few rows at a time exist twice."""
    logits = chunk_logits(hidden, weight, 1.0)
    for rows in logits.split(max(1, ROWS_ELEMENTS // logits.shape[1])):
        rows.copy_(rows.log_softmax(1))
    return logits


def _values(
    hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chunk: log pi and log ref at the targets, and the KL, [n] each."""
    ours = _log_distributions(hidden, weight)
    theirs = _log_distributions(ref_hidden, ref_weight)
    logprobs = ours.gather(1, targets[:, None]).squeeze(1)
    ref_logprobs = theirs.gather(1, targets[:, None]).squeeze(1)
    log_ratio = theirs.neg_().add_(ours)
    return logprobs, ref_logprobs, torch.linalg.vecdot(ours.exp_(), log_ratio)


def _logits_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    kl: Tensor,
    grad_logprobs: Tensor,
    grad_kl: Tensor,
) -> Tensor:
    """[n, V] of one chunk."""
    ours = _log_distributions(hidden, weight)
    theirs = _log_distributions(ref_hidden, ref_weight)
    log_ratio = theirs.neg_().add_(ours)
    inner = log_ratio.sub_(kl[:, None]).mul_(grad_kl[:, None]).sub_(grad_logprobs[:, None])
    return inner.mul_(ours.exp_()).scatter_add_(1, targets[:, None], grad_logprobs[:, None])


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = chunk_rows(vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def logprobs_and_kl(
    hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi [N] and log ref [N] at the targets, and KL(pi || ref) [N], in nats, float32.

    hidden, ref_hidden [N, H]; weight, ref_weight [V, H]; targets [N]. The reference gets no gradient.
    """
    found: tuple[Tensor, Tensor, Tensor] = _LogprobsAndKl.apply(
        hidden, weight, targets, ref_hidden.detach(), ref_weight.detach()
    )
    return found
