"""The head of a large vocabulary: all rows at once, the vocabulary in tiles that stay in the processor's cache.

N trained positions, H hidden size, V vocabulary, tiles of TILE tokens. With z = h @ W.T / temperature:

forward     Z_i = sum_v exp(z_iv) and S_i = sum_v z_iv exp(z_iv), tile after tile against the largest logit so far;
            logprob_i = z_{i,target} - log Z_i, entropy_i = log Z_i - S_i / Z_i
backward    the tiles' logits again; d/dz_iv = g_i (onehot - p_iv) - e_i p_iv (log p_iv + entropy_i), g and e the two
            gradients; each tile adds to the rows' gradient and to its own rows of the matrix's

Four matrix products of [N, H] x [H, V] instead of the three of row chunks, but no [n, V] logits leave the cache, and
the matrix's gradient is passed once a pack and not once a chunk. Source of the running maximum: Milakov and
Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhfctl.models.direct_gradient import allowed, gradient_of
from rlhfctl.models.linear import add_product, product

TILE = 512
LARGE = 32_768  # vocabularies from here on go in tiles


def in_tiles(weight: Tensor) -> bool:
    """Whether this head is computed here: large, and on a processor, where a tile fits its cache."""
    return weight.shape[0] >= LARGE and weight.device.type == "cpu"


def tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(weight), TILE):
        part = slice(start, start + TILE)
        yield part, weight[part]


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows = len(hidden)
        largest = torch.full((rows,), -torch.inf)
        total, mean = torch.zeros(rows), torch.zeros(rows)
        for _, tile in tiles(weight):
            logits = _logits(hidden, tile, temperature)
            before, largest = largest, torch.maximum(largest, logits.amax(1))
            shrink = torch.exp(before - largest)
            if with_entropy:
                powers = torch.exp(logits - largest[:, None])
                mean = mean * shrink + torch.linalg.vecdot(powers, logits)
            else:
                powers = logits.sub_(largest[:, None]).exp_()
            total = total * shrink + powers.sum(1)
        normaliser = largest + total.log()
        chosen = torch.linalg.vecdot(hidden.float(), weight[targets].float()) / temperature
        entropy = normaliser - mean / total if with_entropy else torch.zeros(rows)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that no loss uses costs nothing
        return chosen - normaliser, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        direct = allowed(weight)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = gradient_of(weight) if direct else torch.zeros_like(weight)
        grad_hidden = torch.zeros(hidden.shape)
        onto = None if grad_logprobs is None else grad_logprobs / ctx.temperature
        spread = None if grad_entropy is None else grad_entropy / ctx.temperature
        for part, tile in tiles(weight):
            logprobs = _logits(hidden, tile, ctx.temperature).sub_(normaliser[:, None])
            if spread is None:
                grad_logits = logprobs.exp_()
                if onto is not None:
                    grad_logits.mul_(-onto[:, None])
            else:
                inner = (logprobs + entropy[:, None]).mul_(-spread[:, None])
                if onto is not None:
                    inner.sub_(onto[:, None])
                grad_logits = inner.mul_(logprobs.exp_())
            grad_logits = grad_logits.to(hidden.dtype)
            add_product(grad_hidden, grad_logits, tile.t())
            if grad_weight is not None:
                add_product(grad_weight[part], grad_logits.t(), hidden.t())
        if onto is not None:
            grad_hidden += onto[:, None] * weight[targets]
            if grad_weight is not None:
                grad_weight.index_add_(0, targets, (onto[:, None] * hidden).to(weight.dtype))
        return grad_hidden.to(hidden.dtype), None if direct else grad_weight, None, None, None


def _logits(hidden: Tensor, tile: Tensor, temperature: float) -> Tensor:
    logits = product(hidden, tile).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def tiled_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """As models/head.py: token_logprobs. with_entropy False: the entropies are zeros, and cheaper."""
    return _TiledLogprobs.apply(hidden, weight, targets, temperature, with_entropy)
