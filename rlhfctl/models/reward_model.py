"""A reward model for scoring: backbone plus linear head. Never a random head.

Value-head rule: a head is always created and replaced when the checkpoint holds one. Where it holds none, scoring
is refused with the names that were looked for and those that were found.

How the score is read is written in the checkpoint's configuration, reward_model.read:
last_token   head at the last token that is not padding, as AutoModelForSequenceClassification does (the default)
token_sum    sum of the head over the response's tokens
step_end     head at the end of each step; the score of an answer is its lowest step
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models.encoder_reward import EncoderRewardModel, is_encoder, load_encoder_reward
from rlhfctl.models.hub import local_directory
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import config_of, hidden_at_predictors, load_trunk, safe_weights
from rlhfctl.models.shared_reading import packs_to_read
from rlhfctl.models.value_head import (
    Head,
    ValueHead,
    find_head,
    head_names,
    read_config,
    tensor_names,
    token_classifier,
)

READS = ("last_token", "token_sum", "step_end")


class RewardModel(nn.Module):
    """score = head(h) as `read` says, then (score - mean) / std where the checkpoint asks for it.

    pad: a trailing token that is not read, None: the very last token is read. separator: between steps.
    """

    def __init__(
        self,
        trunk: nn.Module,
        head: Tensor,
        mean: float,
        std: float,
        bias: float = 0.0,
        read: str = "last_token",
        pad: int | None = None,
        separator: str = "\n",
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ValueHead(head.shape[1])
        self.head.weight.data.copy_(head)
        self.mean = mean
        self.std = std
        self.bias = bias
        self.read = read
        self.pad = pad
        self.separator = separator

    def score(
        self, rows: Sequence[list[int]], budget: int, places: Sequence[Sequence[int]] | None = None
    ) -> list[float]:
        """One float per row of token ids; packed without padding under `budget` tokens a forward pass, beginnings that
        rows share once.

        places: for token_sum the indices of each row's response tokens, for step_end those of the ends of its steps.
        """
        if self.read == "last_token":
            places = [[last_read(row, self.pad)] for row in rows]
        elif places is None:
            raise ValueError(f"a reward model that reads {self.read} needs the places")
        return [self.joined(values) for values in self.at(rows, places, budget)]

    def joined(self, values: Sequence[float]) -> float:
        """The score of an answer from what was read at its places."""
        join = min if self.read == "step_end" else sum
        return (float(join(values)) - self.mean) / self.std

    @torch.no_grad()
    def at(
        self, rows: Sequence[list[int]], places: Sequence[Sequence[int]], budget: int
    ) -> list[list[float]]:
        """The head at the given token indices of each row, as it is: without mean and std."""
        device = self.head.weight.device
        bucket = shape_bucket(next(self.trunk.parameters()).dtype, device)
        found: list[list[float]] = [[] for _ in rows]
        for pack in packs_to_read(rows, places, budget, device, bucket):
            values = iter((self.head(hidden_at_predictors(self.trunk, pack)) + self.bias).tolist())
            for row, count in zip(pack.rows, pack.counts, strict=True):
                found[row] = [next(values) for _ in range(count)]
        return found


def last_read(row: Sequence[int], pad: int | None) -> int:
    """The index transformers reads: the rightmost token that is not the padding token."""
    index = len(row) - 1
    while index > 0 and row[index] == pad:
        index -= 1
    return index


def load_reward_model(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> RewardModel | EncoderRewardModel:
    """A decoder's checkpoint, an adapter with its head over the checkpoint that it names, or an encoder's classifier;
    a directory or a hub id.

    Raises Refused where there is no usable head, or weights are incomplete."""
    directory = local_directory(path)
    path = str(directory)
    adapter = (directory / "adapter_config.json").is_file()
    if not adapter and not (directory / "config.json").is_file():
        raise Refused(f"{path} is not a model directory: it has no config.json")
    safe_weights(path)
    if not adapter and is_encoder(directory):
        mean, std = normalisation(path, read_config(directory))
        return load_encoder_reward(path, dtype, device, mean, std, trust_remote_code)
    if adapter:
        from rlhfctl.models.adapter_base import checked_base, quantize_as
        from rlhfctl.models.reward_adapter import load_adapter

        base, trained_on = checked_base(directory)
        trunk = load_trunk(str(base), dtype, device, trust_remote_code)
        quantize_as(trained_on, trunk, device)
        load_adapter(trunk, directory)
        head = find_head(directory) or scoring_head(base, also=directory)
        config = read_config(base) | read_config(directory)
    else:
        head = scoring_head(directory)
        config = read_config(directory)
        trunk = load_trunk(path, dtype, device, trust_remote_code)
    if not bool(head.weight.any()):
        raise Refused(f"the reward head of {path} is all zeros: every score would be the same")
    width = config_of(trunk).hidden_size
    if head.weight.shape[1] != width:
        raise Refused(f"the reward head of {path} is {head.weight.shape[1]} wide, the model {width}")
    mean, std = normalisation(path, config)
    facts = config.get("reward_model") or {}
    read = facts.get("read") or ("step_end" if token_classifier(config) else "last_token")
    if read not in READS:
        raise Refused(f"{path} reads its score by {read!r}: this version knows {', '.join(READS)}")
    model = RewardModel(
        trunk, head.weight, mean, std, head.bias, read, pad_of(config), facts.get("step_separator", "\n")
    )
    return model.to(device).eval()


def pad_of(config: dict[str, Any]) -> int | None:
    """OpenRLHF reads the last attended token, padding token or not."""
    if "RewardModel" in (config.get("architectures") or ()):
        return None
    pad = config.get("pad_token_id")
    return pad if isinstance(pad, int) else None


def scoring_head(directory: Path, also: Path | None = None) -> Head:
    """Raises Refused where the checkpoint (and the adapter `also` over it) holds none."""
    head = find_head(directory)
    if head is None:
        names = sorted(tensor_names(directory))
        shown = ", ".join(name for name in names if "layers." not in name) or "nothing"
        where = f"{directory}" if also is None else f"neither {also} nor its base {directory}"
        raise Refused(
            f"{where} holds {'no' if also is None else 'a'} reward head: looked for "
            f"{', '.join(head_names(directory))}, found {shown}; its scores would be random"
        )
    return head


def normalisation(path: str, config: dict[str, Any]) -> tuple[float, float]:
    """Mean and std of the scores where the checkpoint asks for it, else 0 and 1; finite or Refused."""
    if not config.get("normalize_reward"):
        return 0.0, 1.0
    try:
        mean, std = float(config.get("mean", "nan")), float(config.get("std", "nan"))
    except (TypeError, ValueError):
        mean, std = float("nan"), float("nan")
    if not (abs(mean) < float("inf") and 0 < std < float("inf")):
        raise Refused(
            f"{path} asks for normalised rewards, but its mean ({mean}) and std ({std}) are not usable"
        )
    return mean, std
