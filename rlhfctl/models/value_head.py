"""One linear head [1, H] over hidden states, and how a checkpoint's head is found and checked."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused


class ValueHead(nn.Module):
    """hidden [N, H] -> values [N] in float32, whatever the trunk's dtype. Starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.t()).squeeze(-1)


def head_names(directory: Path) -> list[str]:
    """Where a head may lie: under the prefix that the config names (OpenRLHF), or a usual one."""
    config = json.loads((directory / "config.json").read_text())
    names = [
        f"{config.get('value_head_prefix') or 'score'}.weight",
        "score.weight",
        "head.weight",
        "v_head.weight",
    ]
    return list(dict.fromkeys(names))


def tensor_names(directory: Path) -> Iterator[str]:
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()


def read_head(directory: Path) -> Tensor | None:
    """The checkpoint's head [1, H] in float32; None where it has none. Raises Refused for an unusable one."""
    from safetensors import safe_open

    wanted = head_names(directory)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            held = set(tensors.keys())
            for name in wanted:
                if name in held:
                    return checked_head(
                        tensors.get_tensor(name).float(), f"{directory.name}/{file.name}:{name}"
                    )
    return None


def checked_head(head: Tensor, name: str) -> Tensor:
    if head.dim() != 2 or head.shape[0] != 1:
        raise Refused(f"the value head {name} has shape {list(head.shape)}: a scalar head is [1, hidden]")
    if not bool(torch.isfinite(head).all()):
        raise Refused(f"the value head {name} holds NaN or infinite numbers")
    return head
