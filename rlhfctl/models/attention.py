"""The attention function all models run with: documents of a pack kept apart, or a decode cache, never a padding mask.

Registered with transformers under the name NAME; models hand it their rotated q, k, v and the `layout` keyword that the
caller passed to the model's forward. Without a registered mask function transformers builds no mask at all, so the only
source of truth for what may attend to what is the layout.

B documents in one call, T tokens of a pack, L tokens of one document, S cached positions, H query heads, K key/value
heads, D head size.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rlhfctl.errors import Refused
from rlhfctl.models import pack_attention

NAME = "rlhfctl"
# Keywords by which transformers' models hand over terms of attention that are not computed here.
NOT_COMPUTED = {"softcap": "logits that are capped softly (Gemma 2)", "s_aux": "sinks (gpt-oss)"}


class Layout(Protocol):
    """What may attend to what in one forward pass."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """query [B, H, T, D], key and value [B, K, T, D] -> [B, H, T, D]."""
        ...


@dataclass(slots=True)
class PackedLayout:
    """Documents laid end to end in one row; runs = (start, documents, length), equal lengths in one run.

    Equal neighbours share one kernel call, so packs sorted by length cost few calls even with many short documents.
    """

    runs: list[tuple[int, int, int]]

    @classmethod
    def of_lengths(cls, lengths: list[int], start: int = 0) -> "PackedLayout":
        runs: list[tuple[int, int, int]] = []
        for length in lengths:
            if runs and runs[-1][2] == length:
                first, documents, _ = runs[-1]
                runs[-1] = (first, documents + 1, length)
            else:
                runs.append((start, 1, length))
            start += length
        return cls(runs)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        if pack_attention.computes(query, value):
            return pack_attention.attention(query, key, value, scale, window, self.runs)
        _, heads, _, dim = query.shape
        pieces = []
        for start, documents, length in self.runs:
            end = start + documents * length

            def split(
                x: Tensor, start: int = start, end: int = end, b: int = documents, n: int = length
            ) -> Tensor:
                return x[0, :, start:end].unflatten(1, (b, n)).transpose(0, 1)  # (B, heads, L, D)

            out = causal_attention(split(query), split(key), split(value), scale, window)
            pieces.append(out.transpose(0, 1).reshape(heads, documents * length, dim))
        return torch.cat(pieces, dim=1).unsqueeze(0) if len(pieces) > 1 else pieces[0].unsqueeze(0)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention inside each document: [B, H, L, D] x [B, K, L, D] -> [B, H, L, D]."""
    length = query.shape[2]
    if window is not None and length > window:
        offset = torch.arange(length, device=query.device)
        distance = offset[:, None] - offset[None, :]
        mask = (distance >= 0) & (distance < window)
        return sdpa(query, key, value, scale, mask=mask)
    return sdpa(query, key, value, scale, causal=length > 1)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """scaled_dot_product_attention with grouped heads; bfloat16 on CPU is computed in float32.

    The CPU kernel's bfloat16 backward costs four times the float32 one, and rounds more.
    """
    dtype = query.dtype
    if dtype != torch.float32 and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (mask is not None or query.device.type == "cpu"):
        # The kernels with a mask, and all CPU ones, want one key head per query head.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )
    return out.to(dtype)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns ([B, T, H, D], no weights)."""
    if layout is None:
        raise ValueError(f"attention {NAME!r} needs the `layout` keyword in the model's forward")
    for term, what in NOT_COMPUTED.items():
        if kwargs.get(term) is not None:
            raise Refused(f"attention with {what} is not supported: use a model of another family")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = layout.attend(module.layer_idx, query, key, value, scale, kwargs.get("sliding_window"))  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make NAME known to transformers (idempotent); call before a model is built with it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
