"""The sizes of a decoder, from its config.json alone."""

from dataclasses import dataclass, field
from typing import Any

from rlhfctl.recipe.sections import Lora, Policy


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes. linear: rows and columns of each linear layer by the last part of its name."""

    layers: int
    hidden: int
    heads: int  # x head size
    groups: int  # key/value heads x head size
    inner: int
    vocabulary: int
    tied: bool
    linear: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def trunk(self) -> int:
        matrices = sum(rows * columns for rows, columns in self.linear.values())
        return self.table + self.layers * (matrices + 2 * self.hidden) + self.hidden

    @property
    def table(self) -> int:
        """Elements of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.trunk + (0 if self.tied else self.table)


def shape_of(config: dict[str, Any]) -> Shape | None:
    """None where the usual keys of a decoder with a gated MLP are absent."""
    try:
        hidden, layers, inner = (
            int(config[k]) for k in ("hidden_size", "num_hidden_layers", "intermediate_size")
        )
        count, vocabulary = int(config["num_attention_heads"]), int(config["vocab_size"])
        size = int(config.get("head_dim") or hidden // count)
        groups = int(config.get("num_key_value_heads") or count) * size
    except (KeyError, TypeError, ValueError):
        return None
    heads = count * size
    linear = {
        "q_proj": (heads, hidden),
        "k_proj": (groups, hidden),
        "v_proj": (groups, hidden),
        "o_proj": (hidden, heads),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    tied = bool(config.get("tie_word_embeddings", False))
    return Shape(layers, hidden, heads, groups, inner, vocabulary, tied, linear)


def lora_parameters(lora: Lora, shape: Shape) -> int:
    wanted = lora.target_modules
    chosen = [size for name, size in shape.linear.items() if wanted == "all-linear" or name in wanted]
    return shape.layers * sum(lora.rank * (rows + columns) for rows, columns in chosen)


def quantized_bytes(policy: Policy, shape: Shape, width: int) -> int:
    """What policy.quantization takes off the matrices of the layers."""
    if policy.quantization == "none":
        return 0
    kept = 1.0 if policy.quantization == "int8" else 0.5 + 4 / policy.quantization_block
    matrices = shape.layers * sum(rows * columns for rows, columns in shape.linear.values())
    return int(matrices * (width - kept))
