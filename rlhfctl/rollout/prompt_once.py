"""Keys and values of prompts held once for their samples while these decode.

A token's attention falls into the part over its prompt (p) and the part over what its row has generated (o). With the
output o_x and the logarithm l_x of the softmax's denominator of each part,

    w = sigmoid(l_p - l_o),   output = o_o + w (o_p - o_o)

and the queries of all samples of a prompt meet its keys in one product: n samples read them once and not n times, which
is what a decode step on a processor waits for. Source of the merge: Milakov and Gimelshein, arXiv 1805.02867.

R rows, G prompts of at most P tokens, N samples of the prompt that has most, K key heads, A query heads per key head,
D head size.
"""

import torch
from torch import Tensor

from rlhfctl.models.pack_attention import KERNEL

WORTH = 32  # tokens: shorter prompts cost less to read again than the second kernel call


def shareable(owner: Tensor, prompts: int, width: int) -> bool:
    """Whether samples share prompts that are long enough, on a device whose kernel says what is needed. owner [R]: each
    row's prompt; width: tokens of the longest."""
    return (
        len(owner) > prompts
        and width >= WORTH
        and owner.device.type == "cpu"
        and hasattr(torch.ops.aten, KERNEL)
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> list[Tensor]:
    """[B, K, Q, D] over [B, K, S, D] -> output [B, K, Q, D], logarithm of the denominator [B, K, Q, 1]."""
    out, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=scale
    )
    return [out, normaliser.unsqueeze(-1)]


class Prompts:
    """The prompts' part of a cache. `slots` says which row stands where among the samples of its prompt; a slot without
    a row takes row 0's query along."""

    def __init__(
        self,
        layers: int,
        owner: Tensor,
        lengths: Tensor,
        width: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.prompts, self.heads, self.dim = len(lengths), heads, dim
        self.cache = torch.empty((layers, 2, self.prompts, heads, width, dim), dtype=dtype)
        counts = torch.bincount(owner, minlength=self.prompts)
        self.most = int(counts.max())
        # Rows of one prompt are neighbours or not: the k-th of them takes its k-th slot.
        order = owner.argsort(stable=True)
        within = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner[order]]
        self.slot = torch.empty_like(owner)
        self.slot[order] = owner[order] * self.most + within
        self.slots = torch.zeros(self.prompts * self.most, dtype=torch.long)
        self.slots[self.slot] = torch.arange(len(owner))
        # While no row has ended, rows that lie by prompt stand in their slots already.
        self.in_order = torch.equal(self.slots, torch.arange(len(owner)))
        gaps = torch.arange(width) >= lengths[:, None]
        self.mask: Tensor | None = None
        if bool(gaps.any()):
            self.mask = torch.zeros(gaps.shape, dtype=dtype).masked_fill_(gaps, -torch.inf)[:, None, None, :]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """[G, K, P, D] each."""
        self.cache[layer, 0], self.cache[layer, 1] = key, value

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """query [R', K, A, D], the rows' own keys and values [R', K, T, D] -> [R', K, A, D]."""
        own, own_normaliser = attention(query, keys, values, scale)
        each = (self.prompts, self.most, self.heads, -1)
        placed = query if self.in_order else query[self.slots]
        together = placed.view(*each, self.dim).transpose(1, 2).flatten(2, 3)  # [G, K, N A, D]
        found = attention(together, self.cache[layer, 0], self.cache[layer, 1], scale, self.mask)
        prompt, normaliser = (
            part.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1) for part in found
        )
        if not self.in_order:
            prompt, normaliser = (part[self.slot[: len(query)]] for part in (prompt, normaliser))
        return own.lerp_(prompt, torch.sigmoid(normaliser - own_normaliser))

    def select(self, order: Tensor) -> None:
        """Row order[i] becomes row i."""
        self.in_order = False
        rows = self.slot[order]
        self.slot[: len(order)] = rows
        self.slots.zero_()
        self.slots[rows] = torch.arange(len(order))
