"""Behind the last layer's attention nothing passes from one position to another: what nobody reads is not computed.

Of a pack of T tokens, R positions are read: those that predict a trained token, or a reward model's last tokens. The
last layer's output projection and gated unit see these rows alone; in the other rows of the last hidden states stands
what nobody may use. Their gradients are zero either way.

H hidden, I inner size. Per row that is not read it saves the products of H x H and 3 x H x I of one layer: with few
layers and long prompts much, with many layers little.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

# Decoder layers of the order attention, output projection, residual, norm, mlp, residual.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
WORTH = 0.95  # of the rows: with more of them read, all are computed


def narrowable(trunk: nn.Module) -> nn.Module | None:
    """The trunk's last layer, where its rows may be left out."""
    layers: Any = getattr(trunk, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    last: Any = layers[-1]
    if type(last).__name__ not in LAYERS or not type(last).__module__.startswith("transformers.models."):
        return None
    if getattr(last, "gradient_checkpointing", False):  # it would run again outside of `reading`
        return None
    if any(hasattr(parameter, "ds_id") for parameter in last.mlp.parameters()):
        return None  # ZeRO-3 has hooks of its own on these modules
    return last


@contextmanager
def reading(trunk: nn.Module, read: Tensor, tokens: int, bucket: int = 1) -> Iterator[None]:
    """Inside, one pass of the trunk over [1, T] tokens gives the hidden states of the positions `read` [R], each once.

    bucket: the rows are filled up to a multiple of so many (models/linear.py: shape_bucket).
    """
    last: Any = narrowable(trunk)
    extra = -len(read) % bucket
    if last is None or len(read) + extra > WORTH * tokens:
        yield
        return

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (functional.pad(args[0].index_select(1, read), (0, 0, 0, extra)), *args[1:])

    def put_back(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.new_zeros(1, tokens, out.shape[-1]).index_copy(1, read, out[:, : len(read)])

    with ExitStack() as hooks:
        for module in (last.self_attn.o_proj, last.mlp):
            hooks.callback(module.register_forward_pre_hook(select).remove)
            hooks.callback(module.register_forward_hook(put_back).remove)
        yield
