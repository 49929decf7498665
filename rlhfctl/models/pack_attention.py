"""Attention of a pack on a processor, with its gradient written out: what autograd would do a document at a time.

Two kinds of pieces:

document   its tokens attend to each other, causally
crossing   tokens behind a prefix that several rows share attend to all of the prefix

A token of a row with a prefix has one piece of each kind. With the outputs o and the logarithms l of the softmax's
denominators of both,

    w = sigmoid(l_c - l_d),   output = o_d + w (o_c - o_d),   l = log(exp l_c + exp l_d)

and the gradient of each piece follows from its own products, the denominator and the output of the whole
(Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135, section 3.1): no piece needs the other's keys.

autograd would fill a tensor of the pack's size with zeros for every slice, and keep copies of the keys. Gradients are
computed in float32: the kernel's bfloat16 gradient costs four times as much, and rounds more. Values too, but for those
of bfloat16 on a processor that multiplies such matrices in units of their own (AMX): there the kernel's own forward in
bfloat16, with sums and denominators in float32, costs half of what the float32 one does.

T tokens, H query heads, K key heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhfctl.models.linear import multiplies_tiles

PLACES = 16  # tokens to whose multiple a bfloat16 document is computed, with what lies behind it
KERNEL = "_scaled_dot_product_flash_attention_for_cpu"  # gives the denominators as well
chosen = {"attention": "auto"}  # for all models of the process: choose()

Run = tuple[int, int, int]  # first token, documents of one length, that length


@dataclass(frozen=True, slots=True)
class Crossing:
    """A prefix and the rows behind it. start: its first token; border: the one behind its last; rests: the rows'
    lengths, end to end from there on."""

    start: int
    border: int
    rests: Sequence[int]


def choose(attention: str) -> None:
    """policy.attention of the run in this process: auto, or sdpa for torch's kernel and gradients, call by call."""
    chosen["attention"] = attention


def computes(query: Tensor, value: Tensor) -> bool:
    """Whether a pack's attention is computed here."""
    here = query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    return here and chosen["attention"] == "auto" and hasattr(torch.ops.aten, KERNEL)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    runs: Sequence[Run],
    crossings: Sequence[Crossing] = (),
) -> Tensor:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, H, T, D]. The runs hold every token, in order."""
    out: Tensor = _Attention.apply(query, key, value, scale, window, runs, crossings)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        runs: Sequence[Run],
        crossings: Sequence[Crossing],
    ) -> Tensor:
        q, k, v = inputs(query, key, value, values_in(query))
        # What is mixed of two pieces is rounded once, after it.
        out = torch.empty_like(q, dtype=torch.float32 if crossings else q.dtype)
        normaliser = q.new_empty(q.shape[:2], dtype=torch.float32)
        for run, pieces in zip(runs, split(runs, q, k, v, out, normaliser), strict=True):
            queries, keys, held, values, denominators = pieces
            mask = run_mask(run, window)
            wider = run if mask is not None else filled_up(run, q)
            if wider is not run:
                queries, keys, held = (documents(x, wider) for x in (q, k, v))
            found, sums = torch._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, held, 0.0, mask is None, attn_mask=mask, scale=scale
            )
            if wider is not run:  # a token sees nothing of what lies behind its document
                found, sums = found[:, :, : run[2]], sums[:, :, : run[2]]
            values.copy_(found)
            denominators.copy_(sums)
        for crossing in crossings:
            mask = crossing_mask(crossing, window)
            more, denominator = torch._scaled_dot_product_flash_attention_for_cpu(
                behind(q, crossing), prefix(k, crossing), prefix(v, crossing), attn_mask=mask, scale=scale
            )
            if mask is not None:  # a token that sees nothing of the prefix
                denominator = denominator.masked_fill((mask == -torch.inf).all(1), -torch.inf)
            before, mixed = behind(normaliser, crossing), behind(out, crossing)
            share = torch.sigmoid(denominator - before).unsqueeze(-1)
            mixed.lerp_(more.float(), share)
            before.copy_(torch.logaddexp(before, denominator))
        ctx.save_for_backward(query, key, value, out, normaliser)
        ctx.given = scale, window, runs, crossings
        return out.to(query.dtype)[None].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normaliser = ctx.saved_tensors
        scale, window, runs, crossings = ctx.given
        q, k, v = inputs(query, key, value, torch.float32)
        given = [by_token(grad).float(), q, k, v, out.float(), normaliser]
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for run, pieces in zip(runs, split(runs, *given, *grads), strict=True):
            mask = run_mask(run, window)
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *pieces[:6], 0.0, mask is None, attn_mask=mask, scale=scale
            )
            for place, part in zip(pieces[6:], found, strict=True):
                place.copy_(part)
        for crossing in crossings:
            sides = [prefix if x is k or x is v else behind for x in given]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(side(x, crossing) for side, x in zip(sides, given, strict=True)),
                0.0,
                False,
                attn_mask=crossing_mask(crossing, window),
                scale=scale,
            )
            for side, whole, part in zip((behind, prefix, prefix), grads, found, strict=True):
                side(whole, crossing).add_(part)
        return (*(from_token(x, of) for x, of in zip(grads, (query, key, value), strict=True)), *[None] * 4)


def values_in(query: Tensor) -> torch.dtype:
    """What the outputs are computed in."""
    return query.dtype if query.dtype == torch.bfloat16 and multiplies_tiles() else torch.float32


def filled_up(run: Run, x: Tensor) -> Run:
    """The run's one document with so many tokens behind it that few lengths occur: the bfloat16 kernel keeps code for
    every length it has met, half a MB each. Several documents of one length stay as they are."""
    start, count, length = run
    wider = length + -length % PLACES
    fits = count == 1 and start + wider <= len(x)
    return (start, count, wider) if fits and x.dtype == torch.bfloat16 else run


def by_token(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D]."""
    return x[0].transpose(0, 1)


def inputs(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, D] each: one key head for every query head."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (by_token(x).to(dtype) for x in (query, key, value))
    return (q, k, v) if groups == 1 else (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def from_token(grad: Tensor, of: Tensor) -> Tensor:
    """[T, H, D] -> the gradient of a tensor [1, H or K, T, D]."""
    if grad.shape[1] > of.shape[1]:
        grad = grad.unflatten(1, (of.shape[1], -1)).sum(2)
    return grad.to(of.dtype)[None].transpose(1, 2)


def split(runs: Sequence[Run], *tensors: Tensor) -> list[list[Tensor]]:
    """Tensors [T, H, ...] -> for every run the `documents` of each, in one operation for what stands alone."""
    sizes = [count * length for _, count, length in runs]
    parts = zip(*(x.transpose(0, 1)[None].split(sizes, 2) for x in tensors), strict=True)
    return [
        list(part) if run[1] == 1 else [documents(x, run) for x in tensors]
        for run, part in zip(runs, parts, strict=True)
    ]


def documents(x: Tensor, run: Run) -> Tensor:
    """[T, H, ...] -> the run's [documents, H, length, ...]."""
    start, count, length = run
    return x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


def prefix(x: Tensor, crossing: Crossing) -> Tensor:
    """[T, H, ...] -> [1, H, P, ...]."""
    return x[None, crossing.start : crossing.border].transpose(1, 2)


def behind(x: Tensor, crossing: Crossing) -> Tensor:
    """[T, H, ...] -> [1, H, tokens, ...]."""
    return x[None, crossing.border : crossing.border + sum(crossing.rests)].transpose(1, 2)


def run_mask(run: Run, window: int | None) -> Tensor | None:
    """What a window leaves of a document, [L, L] to be added; None: all that is not ahead."""
    length = run[2]
    if window is None or length <= window:
        return None
    place = torch.arange(length)
    distance = place[:, None] - place
    return torch.zeros(length, length).masked_fill_((distance < 0) | (distance >= window), -torch.inf)


def crossing_mask(crossing: Crossing, window: int | None) -> Tensor | None:
    """What a window leaves of a prefix of P tokens to those behind it, [tokens, P]; None: all of it."""
    length = crossing.border - crossing.start
    if window is None or length + max(crossing.rests) <= window:
        return None
    place = torch.cat([torch.arange(length, length + rest) for rest in crossing.rests])
    lost = place[:, None] - torch.arange(length) >= window
    return torch.zeros(lost.shape).masked_fill_(lost, -torch.inf)
