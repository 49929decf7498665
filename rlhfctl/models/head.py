"""The language-model head and the loss on trained positions only, in chunks.

N trained positions, H hidden size, V vocabulary. Logits of all positions never exist at once: a chunk of them does, in
float32. Two functions with the same values:

token_logprobs   log-probabilities with a gradient still unknown (PPO): chunks are computed again in the backward pass,
                 unless they fit KEEP_ELEMENTS, then the probabilities are kept.
weighted_nll     the loss is a known weighted sum (SFT), so each chunk's gradient is made while its logits exist:
                 three matrix products instead of four.

Large vocabularies go in tiles on a processor instead (models/head_tiles.py), through the same two functions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlhfctl.models.head_tiles import in_tiles, tiled_logprobs
from rlhfctl.models.linear import add_product, product, shape_bucket

KEEP_ELEMENTS = 1 << 24  # float32 probabilities kept for the backward pass: 64 MiB
CHUNK_ELEMENTS = 1 << 24  # float32 logits of one chunk: 64 MiB


def chunk_rows(vocabulary: int) -> int:
    return max(16, CHUNK_ELEMENTS // vocabulary)


def fill_up(hidden: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of zeros up to a multiple of the bucket, so that few different shapes occur; they get no gradient."""
    extra = -len(targets) % shape_bucket(weight.dtype, weight.device)
    return functional.pad(hidden, (0, 0, 0, extra)), functional.pad(targets, (0, extra))


def chunk_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[n, H] x [V, H] -> float32 logits [n, V] divided by the temperature."""
    logits = product(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        recorded: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        keep = recorded and rows * vocabulary <= KEEP_ELEMENTS
        logprobs = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        kept = []
        for start in range(0, rows, chunk_rows(vocabulary)):
            part = slice(start, min(start + chunk_rows(vocabulary), rows))
            every = chunk_logits(hidden[part], weight, temperature).log_softmax(1)
            logprobs[part] = every.gather(1, targets[part, None]).squeeze(1)
            if not (keep or with_entropy):
                del every
                continue
            probabilities = every.exp()
            if with_entropy:
                entropy[part] = -torch.linalg.vecdot(probabilities, every)
            if keep:
                kept.append(probabilities)
            del every, probabilities  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, entropy, *kept)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that no loss uses costs nothing
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, *kept = ctx.saved_tensors
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        for index, start in enumerate(range(0, rows, chunk_rows(vocabulary))):
            part = slice(start, min(start + chunk_rows(vocabulary), rows))
            probabilities = (
                kept[index] if kept else chunk_logits(hidden[part], weight, ctx.temperature).softmax(1)
            )
            if grad_logprobs is None:
                grad_logits = torch.zeros_like(probabilities)
            else:
                scale = grad_logprobs[part, None] / ctx.temperature
                grad_logits = probabilities * -scale  # d logp / d logit = onehot - p
                grad_logits.scatter_add_(1, targets[part, None], scale)
            if grad_entropy is not None:  # d H / d logit = -p * (log p + H)
                scale = grad_entropy[part, None] / ctx.temperature
                spread = torch.special.entr(probabilities).sub_(probabilities * entropy[part, None])
                grad_logits += spread.mul_(scale)
                del spread
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = product(grad_logits, weight.t())
            if ctx.needs_input_grad[1]:
                if grad_weight is None:
                    grad_weight = product(grad_logits.t(), hidden[part].t())
                else:
                    add_product(grad_weight, grad_logits.t(), hidden[part].t())
            del probabilities, grad_logits  # before the next chunk's are made
        if grad_weight is None and ctx.needs_input_grad[1]:  # no rows at all
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight, None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of each distribution.

    hidden [N, H], weight [V, H], targets [N] -> logprobs [N] and entropy [N] in nats, float32, both with a gradient.
    with_entropy False: the entropies are zeros, and cost nothing.
    """
    rows = len(targets)
    hidden, targets = fill_up(hidden, targets, weight)
    if in_tiles(weight):
        logprobs, entropy = tiled_logprobs(hidden, weight, targets, temperature, with_entropy)
    else:
        recorded = torch.is_grad_enabled()
        logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, temperature, with_entropy, recorded)
    return logprobs[:rows], entropy[:rows]


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        needs_weight = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, chunk_rows(vocabulary)):
            part = slice(start, min(start + chunk_rows(vocabulary), rows))
            logits = chunk_logits(hidden[part], weight, 1.0)
            chosen = logits.gather(1, targets[part, None]).squeeze(1)
            largest = logits.amax(1)
            powers = logits.sub_(largest[:, None]).exp_()  # in the logits' memory
            sums = powers.sum(1)
            total += ((largest + sums.log() - chosen) * weights[part]).sum()
            # d nll / d logit = p - onehot, scaled by the position's weight.
            grad_logits = powers.mul_((weights[part] / sums)[:, None])
            grad_logits.scatter_add_(1, targets[part, None], -weights[part, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = product(grad_logits, weight.t())
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.t(), hidden[part].t())
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_weight = None if grad_weight is None else grad_weight.mul_(grad_total.to(grad_weight.dtype))
        return grad_hidden.mul_(grad_total.to(grad_hidden.dtype)), scaled_weight, None, None


def weighted_nll(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights_i * -log softmax(hidden_i @ weight.T)[target_i], in nats.

    hidden [N, H], weight [V, H], targets [N], weights [N] float32 -> scalar. Backward once only: the gradient's memory
    is scaled in place.
    """
    if not torch.is_grad_enabled():
        logprobs, _ = token_logprobs(hidden, weight, targets, with_entropy=False)
        return -(logprobs * weights).sum()
    rows = len(targets)
    hidden, targets = fill_up(hidden, targets, weight)
    weights = functional.pad(weights, (0, len(targets) - rows))
    if in_tiles(weight):
        return -(tiled_logprobs(hidden, weight, targets, with_entropy=False)[0] * weights).sum()
    return _WeightedNll.apply(hidden, weight, targets, weights)
