"""One linear head [1, H] over hidden states, and how a checkpoint's head is found and checked."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused

ADAPTER_PREFIX = "base_model.model."  # peft writes the names of the wrapped model behind it
COPIES = (".modules_to_save.default", ".modules_to_save")


class ValueHead(nn.Module):
    """hidden [N, H] -> values [N] in float32, whatever the trunk's dtype. Starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.float().t()).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Head:
    """weight [1, H] float32, bias; name: where it was found, for messages."""

    weight: Tensor
    bias: float
    name: str


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; {} for an adapter's directory, which may have none."""
    path = directory / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def head_names(directory: Path) -> list[str]:
    """Where a head may lie: under the prefix that the config names (OpenRLHF), or a usual one."""
    names = [
        f"{read_config(directory).get('value_head_prefix') or 'score'}.weight",
        "score.weight",
        "head.weight",
        "v_head.weight",
    ]
    return list(dict.fromkeys(names))


def plain_name(name: str) -> str:
    """A tensor's name in the model itself, without what peft puts around it."""
    name = name.removeprefix(ADAPTER_PREFIX)
    for copy in COPIES:
        name = name.replace(copy, "")
    return name


def tensor_names(directory: Path) -> Iterator[str]:
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()


def read_head(directory: Path) -> Tensor | None:
    """The checkpoint's head [1, H] in float32; None where it has none. Raises Refused for an unusable one."""
    found = find_head(directory)
    return None if found is None else found.weight


def find_head(directory: Path) -> Head | None:
    """As read_head, with the bias. Two labels of a token classifier (wrong, right) become one score: the log-odds of
    right."""
    from safetensors import safe_open

    wanted = head_names(directory)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            held = {plain_name(name): name for name in tensors.keys()}  # noqa: SIM118  no mapping
            name = next((name for name in wanted if name in held), None)
            if name is None:
                continue
            weight = tensors.get_tensor(held[name]).float()
            bias_name = held.get(name.removesuffix("weight") + "bias")
            bias = (
                torch.zeros(weight.shape[0]) if bias_name is None else tensors.get_tensor(bias_name).float()
            )
            if weight.dim() == 2 and weight.shape[0] == 2 and token_classifier(read_config(directory)):
                weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
            place = f"{directory.name}/{file.name}:{name}"
            weight = checked_head(weight, place)
            if bias.shape != (1,) or not bool(torch.isfinite(bias).all()):
                raise Refused(f"the bias of the value head {place} is not one finite number")
            return Head(weight, float(bias[0]), name)
    return None


def token_classifier(config: dict[str, Any]) -> bool:
    return any(str(name).endswith("ForTokenClassification") for name in config.get("architectures") or ())


def checked_head(head: Tensor, name: str) -> Tensor:
    if head.dim() != 2 or head.shape[0] != 1:
        two = " (two labels, as of a classifier of answers: its scores have no single scale)" * (
            head.dim() == 2 and head.shape[0] == 2
        )
        raise Refused(
            f"the value head {name} has shape {list(head.shape)}{two}: a scalar head is [1, hidden]"
        )
    if not bool(torch.isfinite(head).all()):
        raise Refused(f"the value head {name} holds NaN or infinite numbers")
    return head
