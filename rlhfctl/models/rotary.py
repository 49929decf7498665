"""The Llama family's attention with rotary positions written out: four passes over queries and keys, two each way,
where autograd of transformers' formula makes eleven.

    y = x * cos + rotate_half(x) * sin:   y1 = x1 cos1 - x2 sin1,    y2 = x2 cos2 + x1 sin2
                                         dx1 = dy1 cos1 + dy2 sin2, dx2 = dy2 cos2 - dy1 sin1

1 and 2 are the halves of a head. In float32 the sum of two products that transformers makes; the second is rounded with
the sum (in bfloat16 once and not twice). With this package's attention on a CPU; otherwise the module computes what it
did. Source: Su et al., "RoFormer", arXiv 2104.09864.

T tokens of a pack, D head size.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.models.attention import NAME, attention_forward

KINDS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, T, heads, D], cos and sin [1, T, D] -> [1, T, heads, D]."""
    out: Tensor = _Rotated.apply(x, cos.unsqueeze(2), sin.unsqueeze(2))
    return out


class RotaryAttention(nn.Module):
    """What goes before an attention of KINDS; its projections stay, whatever they are."""

    configured_window: bool

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        own = past_key_values is None and module.config._attn_implementation == NAME
        if not own or hidden_states.device.type != "cpu":
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        rows = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*rows, -1, module.head_dim)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        cos, sin = position_embeddings
        out, _ = attention_forward(
            module,
            rotated(query, cos, sin).transpose(1, 2),
            rotated(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            scaling=module.scaling,
            sliding_window=window(module),
            **kwargs,
        )
        return module.o_proj(out.reshape(*rows, -1)), None


def window(module: Any) -> int | None:
    """Tokens that a token of this layer sees; None: all before it. Of Mistral's layers the configuration says it, of
    Qwen's the layer, and Llama's see all."""
    of = module.config if module.configured_window else module
    return getattr(of, "sliding_window", None)


@cache
def written_out(kind: Any) -> Any:
    """The class RotaryAttention before `kind`, always the same one."""
    own = {"__module__": __name__, "configured_window": kind.__name__ == "MistralAttention"}
    return type("WrittenOutAttention", (RotaryAttention, kind), own)


def write_out_rotation(model: nn.Module) -> None:
    """Let the model's attention rotate so (in place; parameters and names stay)."""
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__ in KINDS and kind.__module__.startswith("transformers.models."):
            module.__class__ = written_out(kind)
