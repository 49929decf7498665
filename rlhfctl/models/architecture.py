"""Proof that a model computes a pack as it computes each of its rows alone; one that does not is refused.

Rows lie end to end in a pack, and what keeps them apart is the layout that models/attention.py is called with. A model
with attention code of its own, with a state that runs along the sequence (Mamba, linear attention, convolutions) or
with terms that are not computed there (sinks, soft caps, biases by distance) would train and score something else
without a word. For the families in TRIED a test has shown that they do not; every other one, and code that came with a
checkpoint, shows it here, on its own weights, before anything is read from it:

1. every layer asks the layout;
2. the rows behind a first row are the same behind another first row;
3. every row of the pack has the hidden states that transformers' own attention ("eager") gives for it alone;
4. the logits of a language model are these states times one matrix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.architectures import PLAIN, SCALES, TRIED
from rlhfctl.errors import Refused
from rlhfctl.models.attention import NAME, PackedLayout

ROWS = (9, 14, 6)  # tokens of the rows of the proof
LONGEST = 512  # a window up to this size is proven by a row that is longer
# Largest difference in parts of the largest hidden state. Rounding differs by the kernel, and where experts are chosen
# by how many tokens meet in one.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.02}


@dataclass(slots=True)
class Watched:
    """A layout that knows which layers have asked it, and with which window."""

    layout: PackedLayout
    layers: dict[int, int | None] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        self.layers[layer] = window
        return self.layout.attend(layer, query, key, value, scale, window)


def tried(trunk: nn.Module) -> bool:
    config: Any = trunk.config
    kinds = set(getattr(config, "layer_types", None) or ())
    own_code = not type(trunk).__module__.startswith("transformers.models.")
    return config.model_type in TRIED and not own_code and kinds <= PLAIN


def prove(trunk: nn.Module) -> None:
    """Raises Refused for a model that packs would be wrong for. A trunk whose attention is not ours is left alone."""
    config: Any = trunk.config
    if getattr(config, "_attn_implementation", None) != NAME or tried(trunk):
        return
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    if others := sorted(set(kinds) - PLAIN):
        raise unlike(config, f"it has layers of {', '.join(others)}")
    window = getattr(text, "sliding_window", None) or 0
    context = getattr(text, "max_position_embeddings", None) or LONGEST
    longest = min(window + 5 if window <= LONGEST else 0, context)
    lengths = (ROWS[0], max(ROWS[1], longest), ROWS[2])
    draw = torch.Generator().manual_seed(0)
    first, other, *rest = (
        torch.randint(text.vocab_size, (length,), generator=draw) for length in (lengths[0], *lengths)
    )
    try:
        with torch.no_grad():
            together, layers = packed(trunk, [first, *rest])
            behind_another, _ = packed(trunk, [other, *rest])
            alone = [by_itself(trunk, row) for row in (first, *rest)]
    except Refused:
        raise
    except Exception as error:  # whatever a family's code says of a keyword or a shape that it does not know
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise unlike(config, f"its code cannot compute a pack of rows ({line})") from error
    dtype = next(trunk.parameters()).dtype
    if len(layers) < text.num_hidden_layers:
        raise unlike(
            config,
            f"{len(layers)} of its {text.num_hidden_layers} layers attend by the layout that keeps a pack's rows apart",
        )
    slides = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    # A configuration without kinds of layers does not say which ones slide: one that hands its window over will do.
    if not kinds and LONGEST < window < context and getattr(text, "use_sliding_window", True):
        slides = [] if any(layers.values()) else [0]
    if any(layers.get(layer) is None for layer in slides):
        raise unlike(config, "a layer's sliding window is not given to the attention")
    if apart(together[1:], behind_another[1:]) > SAME.get(dtype, 0.02):
        raise unlike(config, "a row of a pack would be computed from the row before it")
    difference = apart(together, alone)
    if not difference <= TOLERANCES.get(dtype, 0.1):
        raise unlike(
            config,
            f"its attention is not computed as it should be (hidden states differ by {difference:.2g})",
        )


def prove_logits(model: nn.Module, trunk: nn.Module, head: Tensor) -> None:
    """Raises Refused for a language model [V] whose logits are not its last hidden states times the matrix head [V, H]:
    the losses and the sampler compute them so."""
    config: Any = trunk.config
    text = config.get_text_config()
    if tried(trunk) and all(getattr(text, scale, None) in (None, 1) for scale in SCALES):
        return
    row = torch.arange(min(ROWS[0], text.vocab_size), device=head.device)[None]
    with torch.no_grad(), own_attention(trunk):
        hidden = trunk(input_ids=row, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=row, use_cache=False).logits[0].float()
        ours = (hidden.to(head.dtype) @ head.t()).float()
    if not apart([ours], [logits]) <= TOLERANCES.get(head.dtype, 0.1):
        raise unlike(
            config, "its logits are scaled or capped behind the last matrix, which is not computed here"
        )


def packed(trunk: nn.Module, rows: list[Tensor]) -> tuple[list[Tensor], dict[int, int | None]]:
    """Last hidden states [L, H] of each row of one pack, and the layers that asked the layout."""
    device = next(trunk.parameters()).device
    lengths = [len(row) for row in rows]
    layout = Watched(PackedLayout.of_lengths(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    out = trunk(
        input_ids=torch.cat(rows)[None].to(device), position_ids=positions, use_cache=False, layout=layout
    )
    return list(out.last_hidden_state[0].float().split(lengths)), layout.layers


def by_itself(trunk: nn.Module, row: Tensor) -> Tensor:
    """The same of one row with transformers' own attention."""
    with own_attention(trunk):
        out = trunk(input_ids=row[None].to(next(trunk.parameters()).device), use_cache=False)
    hidden: Tensor = out.last_hidden_state[0].float()
    return hidden


@contextmanager
def own_attention(trunk: nn.Module) -> Iterator[None]:
    configs = {
        id(config): config for module in trunk.modules() if (config := getattr(module, "config", None))
    }
    changed = [config for config in configs.values() if getattr(config, "_attn_implementation", None) == NAME]
    for config in changed:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = NAME


def apart(ones: list[Tensor], others: list[Tensor]) -> float:
    """Largest difference in parts of the largest value; nan where a value is."""
    one, other = torch.cat(ones), torch.cat(others)
    return float((one - other).abs().max() / other.abs().max())


@contextmanager
def built(path: str) -> Iterator[None]:
    """Inside: transformers builds a model with our attention. Families with a table of their own look its name up."""
    try:
        yield
    except KeyError as error:
        if error.args != (NAME,):
            raise
        raise Refused(f"{path}: {KEEPS_ITS_OWN}; {INSTEAD}") from None


KEEPS_ITS_OWN = "models of this type compute attention with code of their own, which mixes the rows of a pack"
INSTEAD = "use a model of another family (docs/preflight.md lists those that were tried)"


def unlike(config: Any, reason: str) -> Refused:
    name = getattr(config, "_name_or_path", "") or "the model"
    return Refused(f"{name} is of type {config.model_type}, which is not supported: {reason}; {INSTEAD}")
