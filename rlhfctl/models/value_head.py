"""One linear head [1, H] over hidden states, and how a checkpoint's head is found and checked."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.checkpoint_files import ADAPTER_CONFIG, head_files
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


TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}  # of peft


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; of an adapter's directory without one, the class of model that its task stands for, or {}."""
    path, adapter = directory / "config.json", directory / ADAPTER_CONFIG
    if path.is_file() or not adapter.is_file():
        return json.loads(path.read_text()) if path.is_file() else {}
    task = TASKS.get(json.loads(adapter.read_text()).get("task_type"))
    return {"architectures": [task]} if task else {}


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
    for held in tensor_files(directory).values():
        yield from held


def tensor_files(directory: Path) -> dict[Path, list[str]]:
    """The names in each file where a head may lie."""
    from safetensors import safe_open

    found = {}
    for file in head_files(directory):
        with safe_open(file, framework="pt") as tensors:
            found[file] = list(tensors.keys())
    return found


def read_tensor(file: Path, name: str) -> Tensor:
    """In float32."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name).float()


def read_head(directory: Path) -> Tensor | None:
    """The checkpoint's head [1, H] in float32; None where it has none. Raises Refused for an unusable one."""
    found = find_head(directory)
    return None if found is None else found.weight


def find_head(directory: Path) -> Head | None:
    """As read_head, with the bias. Two labels of a token classifier (wrong, right) become one score: the log-odds of
    right."""
    config, files = read_config(directory), tensor_files(directory)
    places: dict[str, list[tuple[Path, str]]] = {}  # by its name in the model: the file, and its name there
    for file, held in files.items():
        for given in held:
            places.setdefault(plain_name(given), []).append((file, given))
    names = [name for name in head_names(directory) if name in places]
    if not names:
        refuse_unread(directory, places)
        return None
    name = names[0]
    weight = the_one(places, names[:1] if config.get("value_head_prefix") else names)
    bias_name = name.removesuffix("weight") + "bias"
    bias = the_one(places, [bias_name]) if bias_name in places else torch.zeros(weight.shape[0])
    if weight.dim() == 2 and weight.shape[0] == 2 and token_classifier(config):
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    place = f"{directory.name}/{places[name][0][0].name}:{name}"
    weight = checked_head(weight, place)
    if bias.shape != (1,) or not bool(torch.isfinite(bias).all()):
        raise Refused(f"the bias of the value head {place} is not one finite number")
    return Head(weight, float(bias[0]), name)


def refuse_unread(directory: Path, names: Iterable[str]) -> None:
    """A head of another form is not "no head": a new one would take its place in silence."""
    odd = sorted(name for name in names if name.startswith(("score.", "v_head.", "value_head.")))
    if odd:
        raise Refused(
            f"{directory} holds no reward head that is read here: looked for {', '.join(head_names(directory))}, "
            f"found {', '.join(odd)}; name one matrix by value_head_prefix in config.json, or ask for a new head"
        )


def the_one(places: dict[str, list[tuple[Path, str]]], names: list[str]) -> Tensor:
    """The tensor of the first name. Raises Refused where another one of its shape may be meant as well."""
    (file, given), *others = [place for name in names for place in places[name]]
    tensor = read_tensor(file, given)
    for other, name in others:
        found = read_tensor(other, name)
        if found.shape == tensor.shape and not torch.equal(found, tensor):
            raise Refused(
                f"{file.parent} holds two different heads, {file.name}:{given} and {other.name}:{name}: leave the one "
                "that is meant, or name it as value_head_prefix in config.json"
            )
    return tensor


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
