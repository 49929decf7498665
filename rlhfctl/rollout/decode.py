"""Decoding for the Llama and Qwen2 family, written out: fused matrices, a static cache, grouped heads without copies.

It computes what transformers' module computes, in float32 to 1e-5 (tests/rollout/test_decode.py); prompts pass through
the module itself. Whatever it does not know is for `uncovered` to say, and hf.py then decodes with the module.

R rows, G groups (one prompt each), P prompt tokens, S places of the cache, H hidden, A query heads, K key/value heads,
D head size, I inner size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhfctl.models.attention import causal_attention
from rlhfctl.models.direct_gradient import DirectEmbedding
from rlhfctl.models.linear import OnednnLinear, mkl_packs, onednn_decodes
from rlhfctl.models.load import backbone, config_of, head_weight
from rlhfctl.models.merged import merged_linear
from rlhfctl.rollout.prompt_once import Prompts, shareable

FAMILY = {
    "transformers.models.llama.modeling_llama": "Llama",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2",
}
# Kinds of rope whose angles depend on the position alone, not on how long the sequence has become.
ROPES = ("default", "linear", "llama3")
PAYS = 16  # steps after which matrices laid out in MKL's order have paid: that takes as long as three steps
FEWEST = 4  # rows for which it does
ROWS = 8  # with oneDNN, batches shrink by so many rows at a time: it keeps code for every shape it has met


def uncovered(model: nn.Module) -> str | None:
    """What in the model this file does not compute, in a few words; None: nothing."""
    trunk: Any = backbone(model)
    source = type(trunk).__module__
    if FAMILY.get(source, "") + "Model" != type(trunk).__name__:
        return f"{type(trunk).__name__} is not of the Llama or Qwen2 family"
    expected = {FAMILY[source] + part for part in ("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")}
    if trunk.rotary_emb.rope_type not in ROPES:
        return f"rope scaling {trunk.rotary_emb.rope_type}"
    for module in trunk.modules():
        kind = type(module)
        if kind.__module__ == source and kind.__name__ not in expected | {f"{FAMILY[source]}RotaryEmbedding"}:
            return f"{kind.__name__} in the trunk"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"a hook on {kind.__name__}"
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "parameters divided over ranks (ZeRO-3)"
    weight = head_weight(model)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights in {weight.dtype}"
    for layer in trunk.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if getattr(attention, "sliding_window", None) is not None:
            return "sliding-window attention"
        matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        for matrix in (*matrices, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            reason = unlike_a_matrix(matrix, weight)
            if reason is not None:
                return reason
    return (
        None
        if type(trunk.embed_tokens) in (nn.Embedding, DirectEmbedding)
        else "an embedding of another kind"
    )


def unlike_a_matrix(layer: nn.Module, like: Tensor) -> str | None:
    """Why a linear layer is not x W^T + b for one matrix that can be read."""
    base, adapted = layer, False
    if not isinstance(layer, nn.Linear) and hasattr(layer, "base_layer"):
        from peft.tuners.lora.layer import Linear

        lora: Any = layer
        if type(layer) is not Linear or lora.merged or lora.disable_adapters or lora.fan_in_fan_out:
            return f"an adapter of another kind ({type(layer).__name__})"
        if getattr(lora, "lora_variant", None) or any(getattr(lora, "lora_bias", {}).values()):
            return "a variant of LoRA"
        base, adapted = lora.get_base_layer(), True
    if type(base) not in (nn.Linear, OnednnLinear):
        return f"{type(base).__name__} layers"
    if adapted and like.dtype != torch.float32:
        return "LoRA over bfloat16 weights, where a merged matrix rounds small updates away"
    if base.weight.dtype != like.dtype or base.weight.device != like.device:
        return "weights of several dtypes or devices"
    return None


@dataclass(slots=True)
class Matrix:
    """One or several matrices over the same input, their outputs side by side."""

    weight: Tensor
    bias: Tensor | None
    onednn: bool
    packed: Tensor | None = None  # the matrix in MKL's order, for products of `rows` rows
    rows: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.packed is not None and len(x) == self.rows:
            return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows)
        return functional.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class Layer:
    attention_norm: Tensor
    qkv: Matrix
    out: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


class FusedWeights:
    """A copy of the trunk's matrices, fused, adapters merged, and in oneDNN's or MKL's own order of memory where these
    make the products. Made for one call of generate and freed after it: never older than the policy."""

    def __init__(self, model: nn.Module) -> None:
        trunk: Any = backbone(model)
        self.trunk, self.config = trunk, config_of(trunk)
        self.head = head_weight(model)
        self.dtype, self.device = self.head.dtype, self.head.device
        self.onednn = onednn_decodes(self.dtype, self.device)
        self.packs = not self.onednn and mkl_packs(self.dtype, self.device)
        self.packed_rows = 0
        self.embedding: Tensor = trunk.embed_tokens.weight
        self.final_norm: Tensor = trunk.norm.weight
        self.eps = torch.tensor(trunk.norm.variance_epsilon, device=self.device)
        self.activation = trunk.layers[0].mlp.act_fn
        first = trunk.layers[0].self_attn
        self.dim: int = first.head_dim
        self.queries = self.config.num_attention_heads
        self.keys = self.config.num_key_value_heads
        self.scale: float = first.scaling
        self.layers = [self.fused(layer) for layer in trunk.layers]
        self.logits = self.stored(self.head, None)

    def fused(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            attention_norm=layer.input_layernorm.weight,
            qkv=self.side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
            out=self.side_by_side(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=self.side_by_side(mlp.gate_proj, mlp.up_proj),
            down=self.side_by_side(mlp.down_proj),
        )

    def side_by_side(self, *layers: nn.Module) -> Matrix:
        plain = [layer if isinstance(layer, nn.Linear) else merged_linear(layer) for layer in layers]
        matrices: list[Tensor] = [layer.weight for layer in plain]
        biases: list[Tensor | None] = [layer.bias for layer in plain]
        weight = matrices[0] if len(plain) == 1 else torch.cat(matrices)
        if all(bias is None for bias in biases):
            return self.stored(weight, None)
        pairs = zip(matrices, biases, strict=True)
        return self.stored(weight, torch.cat([m.new_zeros(len(m)) if b is None else b for m, b in pairs]))

    def stored(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        weight = weight.detach()
        if self.onednn:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        return Matrix(weight, None if bias is None else bias.detach(), self.onednn)

    def pack(self, rows: int) -> None:
        """Lay the matrices out for products of so many rows, in MKL's order; 0: for none."""
        if not self.packs or rows == self.packed_rows:
            return
        parts = (part for each in self.layers for part in (each.qkv, each.out, each.gate_up, each.down))
        for matrix in (*parts, self.logits):
            matrix.packed = None  # before the next one is made
            if rows:
                matrix.packed = torch.ops.mkl._mkl_reorder_linear_weight(matrix.weight, rows)
            matrix.rows = rows
        self.packed_rows = rows

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, size, size, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight) if x.dtype == torch.float32 else weight * (x * scale).to(x.dtype)


class StaticDecoder:
    """One batch: R rows, keys and values of P + room places each, written in place.

    The rows that still go on are the first ones: one that has finished is overwritten by the last. A prompt shorter
    than P leaves a gap behind it that the mask, made once, hides; positions are carried by the keys' rotation, not by
    their place. Long prompts that several rows share are held once (rollout/prompt_once.py); the cache then has the
    rows' own tokens alone.
    """

    def __init__(self, weights: FusedWeights, owner: Tensor, lengths: Tensor, width: int, room: int) -> None:
        """owner [R]: the group of each row; lengths [G]: of the prompts; width: P."""
        self.weights, self.owner, self.lengths = weights, owner, lengths
        self.rows, self.width = len(owner), width
        # The CPU's bfloat16 attention is slower than the float32 one, and rounds more.
        self.exact = torch.float32 if weights.device.type == "cpu" else weights.dtype
        layers, heads, dim = len(weights.layers), weights.keys, weights.dim
        self.prompts: Prompts | None = None
        if shareable(owner, len(lengths), width):
            self.prompts = Prompts(layers, owner, lengths, width, heads, dim, self.exact)
        self.filled = 0 if self.prompts else width
        shape = (layers, 2, self.rows, heads, self.filled + room, dim)
        self.cache = torch.empty(shape, dtype=self.exact, device=weights.device)
        weights.pack(self.rows if room >= PAYS and self.rows >= FEWEST else 0)
        places = torch.arange(width + room, device=weights.device)
        cos, sin = weights.trunk.rotary_emb(weights.embedding, places[None])
        half = dim // 2
        # rotate_half(x) * sin = roll(x) * (-sin, sin)
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        gaps = (places >= lengths[owner][:, None]) & (places < width)
        self.mask: Tensor | None = None
        if self.prompts is None and bool(gaps.any()):
            hidden = torch.zeros(gaps.shape, dtype=self.exact, device=weights.device)
            self.mask = hidden.masked_fill_(gaps, -torch.inf)[:, None, None, :]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """The module's attention over the prompts (models/attention.py: Layout): keys and values are kept."""
        if self.prompts:
            self.prompts.store(layer, key, value)
        else:
            self.cache[layer, 0, :, :, : self.width] = key.index_select(0, self.owner)
            self.cache[layer, 1, :, :, : self.width] = value.index_select(0, self.owner)
        # Right-padded prompts need no mask: causality keeps real tokens from the padding behind them.
        return causal_attention(query, key, value, scale, window)

    def prefill(self, ids: Tensor) -> Tensor:
        """ids [G, P], right-padded -> logits [R, V] of each row's first token."""
        positions = torch.arange(self.width, device=ids.device).expand(len(ids), -1)
        out = self.weights.trunk(input_ids=ids, position_ids=positions, use_cache=False, layout=self)
        last = out.last_hidden_state[torch.arange(len(ids), device=ids.device), self.lengths - 1]
        return self.weights.logits(last.index_select(0, self.owner))

    @torch.inference_mode()  # a twentieth less time than no_grad at 32 rows
    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The rows' newest tokens [R'] and their positions -> logits [R', V]; R' <= R, in the order of the rows."""
        w, live = self.weights, len(ids)
        rows = self.computed(live)
        if rows > live:  # finished rows that go along
            ids, positions = (functional.pad(each, (0, rows - live)) for each in (ids, positions))
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # (R, 1, D)
        place, end = self.filled, self.filled + 1
        mask = None if self.mask is None else self.mask[:rows, :, :, :end]
        turned = w.queries + w.keys
        x = functional.embedding(ids, w.embedding)
        for number, (layer, cache) in enumerate(zip(w.layers, self.cache.unbind(0), strict=True)):
            qkv = layer.qkv(w.norm(x, layer.attention_norm)).view(rows, turned + w.keys, w.dim)
            straight = qkv[:, :turned]
            rotated = straight * cos + straight.roll(w.dim // 2, -1) * sin
            keys, values = cache[0, :rows], cache[1, :rows]
            keys[:, :, place], values[:, :, place] = rotated[:, w.queries :], qkv[:, turned:]
            # The A / K query heads of one key head stand where the tokens of a longer query would.
            query = rotated[:, : w.queries].view(rows, w.keys, -1, w.dim).to(self.exact)
            own = keys[:, :, :end], values[:, :, :end]
            if self.prompts:
                mixed = self.prompts.attend(number, query, *own, w.scale)
            else:
                mixed = functional.scaled_dot_product_attention(query, *own, attn_mask=mask, scale=w.scale)
            x = x + layer.out(mixed.reshape(rows, -1).to(x.dtype))
            gate, up = layer.gate_up(w.norm(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(w.activation(gate) * up)
        self.filled = end
        return w.logits(w.norm(x, w.final_norm))[:live]

    def computed(self, live: int) -> int:
        """Rows of a step for so many that go on: finished ones go along where that is faster."""
        w = self.weights
        if w.onednn:
            return min(self.rows, -(-live // ROWS) * ROWS)
        if FEWEST <= live <= w.packed_rows // 2 and self.cache.shape[-2] - self.filled >= PAYS:
            w.pack(live)
        return max(live, w.packed_rows) if 4 * live > 3 * w.packed_rows else live

    def select(self, order: Tensor) -> None:
        """Row order[i] becomes row i; the rows past len(order) are no more."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(1)
        self.cache[:, :, moved, :, : self.filled] = self.cache[:, :, order[moved], :, : self.filled]
        if self.prompts:
            self.prompts.select(order)
        if self.mask is not None:
            self.mask[moved] = self.mask[order[moved]]
