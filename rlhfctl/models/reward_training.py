"""A reward model in training: a Hugging Face sequence classifier with one label, so that it saves as one.

Value-head rule: a head is always created, at zero; replaced when the checkpoint holds one; kept new when it does not,
or when the recipe asks for a new one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models import attention
from rlhfctl.models.encoder_training import is_encoder_config, load_encoder_for_training
from rlhfctl.models.hub import local_directory
from rlhfctl.models.load import (
    backbone,
    hidden_at_predictors,
    load_classifier,
    prepare,
    refuse_incomplete,
    resolve_dtype,
    round_parameters,
    safe_weights,
)
from rlhfctl.models.lora import add_lora
from rlhfctl.models.packing import Pack
from rlhfctl.models.quantize import quantize
from rlhfctl.models.unread import refuse_unread
from rlhfctl.models.value_head import find_head
from rlhfctl.recipe.sections import Policy

HEAD, BIAS = "score.weight", "score.bias"


def load_for_training(policy: Policy, head: str, device: torch.device, seed: int) -> tuple[nn.Module, str]:
    """The model, everything in the recipe's dtype but the head, which is float32; and where the head comes from.

    head: auto (the checkpoint's where it has one, else zero) | zero | normal. Raises Refused for an incomplete
    checkpoint, an unusable head, or an architecture whose classifier is not one matrix over the last hidden state.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(
        policy.from_config or str(policy.path), trust_remote_code=policy.trust_remote_code
    )
    if is_encoder_config(config):
        path = None if policy.from_config is not None else local_directory(str(policy.path))
        return load_encoder_for_training(policy, config, head, path, device, seed)
    attention.register()
    dtype = resolve_dtype(policy.dtype, device)
    options: dict[str, Any] = {
        "attn_implementation": attention.NAME,
        "trust_remote_code": policy.trust_remote_code,
    }
    origin: Tensor | None = None
    told = "new: zeros"
    if policy.from_config is not None:
        torch.manual_seed(seed)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **options)
        round_parameters(model, dtype)
    else:
        path = local_directory(str(policy.path))
        safe_weights(str(path))
        found = find_head(path) if head == "auto" else None
        if found is not None:
            without = " without its bias, which training has no place for" if found.bias else ""
            origin, told = found.weight, f"the checkpoint's {found.name}{without}"
        model, report = load_classifier(path, dtype, options)
        refuse_incomplete(str(policy.path), without_head(report))
        refuse_unread(str(policy.path), model, without_head(report))
    layer: Any = getattr(model, "score", None)
    if not isinstance(layer, nn.Linear) or getattr(layer, "bias", None) is not None:
        raise Refused(
            f"{type(model).__name__} has no head `score` over the last hidden state: decoders, and encoders with a "
            "`classifier`, can be trained as reward models"
        )
    set_head(layer, origin, head, seed)
    if origin is None and head == "normal":
        told = "new: random, standard deviation 1 / sqrt(hidden)"
    if policy.quantization != "none":
        quantize(backbone(model), policy.quantization, policy.quantization_block, device)
    model = prepare(model, device, policy.gradient_checkpointing)
    if policy.lora is not None:
        add_lora(backbone(model), policy.lora, seed)
    layer.weight.requires_grad_(True)
    return model, told


def without_head(report: dict[str, Any]) -> dict[str, Any]:
    """The loading report without the head, which is set here."""

    def name(key: Any) -> str:
        return str(key[0] if isinstance(key, tuple) else key)

    lists = ("missing_keys", "mismatched_keys", "unexpected_keys")
    return {key: [k for k in report.get(key, ()) if name(k) not in (HEAD, BIAS)] for key in lists}


def set_head(layer: nn.Linear, origin: Tensor | None, head: str, seed: int) -> None:
    """In float32 whatever the model's dtype: scores are compared by small differences."""
    width = layer.weight.shape[1]
    weight = torch.zeros(1, width)
    if origin is not None:
        if origin.shape[1] != width:
            raise Refused(f"the checkpoint's head is {origin.shape[1]} wide, the model {width}")
        weight = origin.clone()
    elif head == "normal":
        weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    layer.weight = nn.Parameter(weight.to(layer.weight.device))


def scores_at(model: nn.Module, pack: Pack) -> Tensor:
    """Raw scores [N] float32 at the positions the pack reads."""
    hidden = hidden_at_predictors(backbone(model), pack)
    layer: Any = model.score
    return (hidden.float() @ layer.weight.float().t()).squeeze(-1)
