"""An encoder (BERT, RoBERTa, ModernBERT) in training as a reward model: its own sequence classifier with one label.

Every token sees every other, so rows are padded and masked as the architecture wants it, not packed. What stands
between the encoder and the score (pooler, classifier) differs by architecture: what the checkpoint lacks of it is new,
drawn from the recipe's seed, and the last matrix follows the value-head rule (reward_training.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models.load import load_classifier, prepare, refuse_incomplete, resolve_dtype, round_parameters
from rlhfctl.models.value_head import checked_head
from rlhfctl.recipe.sections import Policy

NEW = ("classifier.", "head.", "score.")  # layers that only a sequence classifier has
POOLER = ".pooler."


def is_encoder_config(config: Any) -> bool:
    """Of a model that is pretrained by filling in masked tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "is_encoder_decoder", False)
    )


def is_encoder(model: nn.Module) -> bool:
    return is_encoder_config(model.config)


def load_encoder_for_training(
    policy: Policy, config: Any, head: str, path: Path | None, device: torch.device, seed: int
) -> tuple[nn.Module, str]:
    """As reward_training.load_for_training; path: of the checkpoint, None: random weights of `config`."""
    from transformers import AutoModelForSequenceClassification

    if policy.lora is not None:
        raise Refused("policy.lora: a reward model over an encoder is trained whole; leave lora out")
    dtype = resolve_dtype(policy.dtype, device)
    options: dict[str, Any] = {"trust_remote_code": policy.trust_remote_code}
    torch.manual_seed(seed)  # of what is new
    missing: list[str] = []
    if path is None:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, **options)
        round_parameters(model, dtype)
        missing = list(NEW)
    else:
        model, report = load_classifier(path, dtype, options)
        missing = [name for key in ("missing_keys", "mismatched_keys") for name in names(report, key)]
        old = {key: [n for n in names(report, key) if not is_new(n)] for key in report}
        refuse_incomplete(str(policy.path), old)
    layer = last_linear(model)
    kept = head == "auto" and not any(name.startswith(NEW) for name in missing)
    if kept:
        weight = checked_head(layer.weight.detach().float(), f"{policy.path}:classifier")
        if not bool(weight.any()):
            raise Refused(
                f"the reward head of {policy.path} is all zeros: algorithm.head: zero says so on purpose"
            )
    else:
        new_head(layer, head, seed)
    model = prepare(model, device, policy.gradient_checkpointing)
    in_float32(model)
    fresh = sorted({name.rsplit(".", 1)[0] for name in missing if POOLER in name})
    told = "the checkpoint's classifier" if kept else f"new: {'normal' if head == 'normal' else 'zeros'}"
    return model, f"{told}; new: {', '.join(fresh)}" if fresh else told


def names(report: dict[str, Any], key: str) -> list[str]:
    return sorted(str(k[0] if isinstance(k, tuple) else k) for k in report.get(key) or ())


def is_new(name: str) -> bool:
    return name.startswith(NEW) or POOLER in name


def last_linear(model: nn.Module) -> nn.Linear:
    """The matrix that gives the score. Raises Refused where the classifier has another form."""
    part: Any = getattr(model, "classifier", None)
    layers = (
        [module for module in part.modules() if isinstance(module, nn.Linear)] if part is not None else []
    )
    if not layers or layers[-1].out_features != 1:
        raise Refused(f"{type(model).__name__} has no `classifier` that ends in one matrix: not supported")
    return layers[-1]


def new_head(layer: nn.Linear, head: str, seed: int) -> None:
    """Zero, or normal with deviation 1 / sqrt(hidden); the bias is zero."""
    width = layer.weight.shape[1]
    with torch.no_grad():
        weight = torch.zeros(1, width)
        if head == "normal":
            weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.zero_()


def in_float32(model: Any) -> None:
    """The classifier, whatever the model's dtype: scores are compared by small differences."""
    model.classifier.float()
    model.classifier.register_forward_pre_hook(lambda module, given: (given[0].float(), *given[1:]))


def scores_of(model: Any, rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Raw scores [len(rows)] float32, rows of one padded batch."""
    device = next(model.parameters()).device
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    scores: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()
    return scores
