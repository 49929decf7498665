"""A reward model for scoring: backbone plus linear head, read at the last token. Never a random head.

Value-head rule: a head is always created and replaced when the checkpoint holds one. Where it holds none, scoring
is refused with the names that were looked for and those that were found.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models.attention import PackedLayout
from rlhfctl.models.load import load_trunk
from rlhfctl.models.packing import plan_packs
from rlhfctl.models.value_head import ValueHead, head_names, read_head, tensor_names


class RewardModel(nn.Module):
    """score = head(h_last), then (score - mean) / std where the checkpoint asks for it."""

    def __init__(self, trunk: nn.Module, head: Tensor, mean: float, std: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ValueHead(head.shape[1])
        self.head.weight.data.copy_(head)
        self.mean = mean
        self.std = std

    @torch.no_grad()
    def score(self, rows: Sequence[list[int]], budget: int) -> list[float]:
        """One float per row of token ids; packed without padding under `budget` tokens a forward pass."""
        device = self.head.weight.device
        scores = [0.0] * len(rows)
        lengths = [len(row) for row in rows]
        for members in plan_packs(range(len(rows)), lengths, budget):
            ids = torch.tensor([[token for row in members for token in rows[row]]], device=device)
            positions = torch.tensor([[p for row in members for p in range(lengths[row])]], device=device)
            sizes = torch.tensor([lengths[row] for row in members], device=device)
            layout = PackedLayout.of_lengths(sizes.tolist())
            hidden = self.trunk(
                input_ids=ids, position_ids=positions, use_cache=False, layout=layout
            ).last_hidden_state[0]
            found = (self.head(hidden[sizes.cumsum(0) - 1]) - self.mean) / self.std
            for row, value in zip(members, found.tolist(), strict=True):
                scores[row] = value
        return scores


def load_reward_model(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> RewardModel:
    """Raises Refused where the checkpoint holds no usable head, or incomplete weights."""
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise Refused(f"{path} is not a model directory: it has no config.json")
    head = read_head(directory)
    if head is None:
        names = sorted(tensor_names(directory))
        shown = ", ".join(name for name in names if "layers." not in name) or "nothing"
        raise Refused(
            f"{path} holds no reward head: looked for {', '.join(head_names(directory))}, found {shown}; "
            "its scores would be random"
        )
    if not bool(head.any()):
        raise Refused(f"the reward head of {path} is all zeros: every score would be the same")
    config = json.loads((directory / "config.json").read_text())
    mean, std = 0.0, 1.0
    if config.get("normalize_reward"):
        mean, std = float(config.get("mean", "nan")), float(config.get("std", "nan"))
        if not (abs(mean) < float("inf") and 0 < std < float("inf")):
            raise Refused(
                f"{path} asks for normalised rewards, but its mean ({mean}) and std ({std}) are not usable"
            )
    trunk = load_trunk(path, dtype, device)
    return RewardModel(trunk, head, mean, std).to(device).eval()
