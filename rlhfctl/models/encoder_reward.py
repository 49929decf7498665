"""A reward model over an encoder (BERT, RoBERTa, DeBERTa): the checkpoint's own sequence classifier with one label.

Every token sees every other, so rows are padded and masked as the architecture wants it, not packed. For scoring only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfctl.errors import Refused
from rlhfctl.models.load import own_words, refuse_incomplete, safe_weights
from rlhfctl.models.packing import plan_packs
from rlhfctl.models.value_head import checked_head, read_config, tensor_names


class EncoderRewardModel(nn.Module):
    """The interface of models.reward_model.RewardModel; head: the last layer of the classifier."""

    read = "last_token"  # one score a sequence: the bridge looks up no places
    separator = "\n"

    def __init__(self, model: nn.Module, head: nn.Linear, mean: float, std: float, pad: int) -> None:
        super().__init__()
        self.trunk = model
        self.head = head
        self.mean = mean
        self.std = std
        self.pad = pad

    @torch.no_grad()
    def score(
        self, rows: Sequence[list[int]], budget: int, places: Sequence[Sequence[int]] | None = None
    ) -> list[float]:
        """One float per row of token ids, padded batches of at most `budget` tokens. places: not used."""
        device = self.head.weight.device
        scores = [0.0] * len(rows)
        longest = max((len(row) for row in rows), default=1)
        for members in plan_packs(range(len(rows)), [longest] * len(rows), max(budget, longest)):
            width = max(len(rows[row]) for row in members)
            ids = torch.full((len(members), width), self.pad, device=device)
            mask = torch.zeros((len(members), width), dtype=torch.long, device=device)
            for place, row in enumerate(members):
                ids[place, : len(rows[row])] = torch.tensor(rows[row], device=device)
                mask[place, : len(rows[row])] = 1
            found = self.trunk(input_ids=ids, attention_mask=mask).logits[:, 0].float()
            for row, value in zip(members, ((found - self.mean) / self.std).tolist(), strict=True):
                scores[row] = value
        return scores


def is_encoder(directory: Path) -> bool:
    """Sequence classifiers whose head is a `classifier` over a pooled state, not a `score` at the last token."""
    named = any(str(name).endswith("ForSequenceClassification") for name in _architectures(directory))
    return named and any(name.startswith("classifier.") for name in tensor_names(directory))


def _architectures(directory: Path) -> list[Any]:
    return read_config(directory).get("architectures") or []


def load_encoder_reward(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    mean: float,
    std: float,
    trust_remote_code: bool = False,
) -> EncoderRewardModel:
    """Raises Refused for an incomplete checkpoint, several labels, or a last layer that is NaN or all zeros."""
    from transformers import AutoModelForSequenceClassification

    safe_weights(path)
    with own_words():
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
        )
    model, report = loaded
    refuse_incomplete(path, report)
    layers = [module for module in model.classifier.modules() if isinstance(module, nn.Linear)]
    head = layers[-1]
    weight = checked_head(head.weight.detach().float(), f"{path}:classifier")
    if not bool(weight.any()):
        raise Refused(f"the reward head of {path} is all zeros: every score would be the same")
    pad = model.config.pad_token_id
    return EncoderRewardModel(model, head, mean, std, pad if pad is not None else 0).to(device).eval()
