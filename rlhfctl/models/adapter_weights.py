"""An adapter's file put into a model that has the adapter's layers: every tensor finds its place, or it is refused.

Beside the low-rank matrices such a file holds what was trained whole (peft's modules_to_save, biases). Those take the
place of the base's own weights: an adapter that is loaded is never switched off, and its names stay those of the base.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfctl.checkpoint_files import weight_files
from rlhfctl.errors import Refused
from rlhfctl.models.lora import POLICY
from rlhfctl.models.quantize import put
from rlhfctl.models.value_head import plain_name

BASE = ".base_layer."  # peft keeps an adapted layer's own weights behind it


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors under their names in the model."""
    from safetensors.torch import load_file

    found = {}
    for file in weight_files(directory):
        found.update({plain_name(name): tensor for name, tensor in load_file(file).items()})
    return found


def put_adapter(model: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """Raises Refused where a tensor has no place in the model, or a low-rank matrix of the model no tensor."""
    from peft import set_peft_model_state_dict

    unwrap(model)
    low_rank = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    refuse_other_shapes(model, low_rank, directory)
    own = {
        name.replace(BASE, "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name in sorted(set(tensors) - set(low_rank)):
        replace(own, name.replace(BASE, "."), tensors[name], directory)
    report: Any = set_peft_model_state_dict(model, low_rank)
    if not low_rank or report.unexpected_keys:
        what = report.unexpected_keys[0] if low_rank else "no LoRA weights at all"
        raise Refused(f"the adapter {directory} does not fit its base model: it holds {what}")
    lost = [name for name in report.missing_keys if "lora_" in name and POLICY in name.split(".")]
    if lost:
        raise Refused(f"the adapter {directory} lacks {lost[0]}, which its configuration asks for")


def unwrap(model: nn.Module) -> None:
    """Take out the copies that peft puts beside modules that were trained whole; in place."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            put(model, name, module.original_module)


@torch.no_grad()
def replace(own: dict[str, nn.Parameter], name: str, tensor: Tensor, directory: Path) -> None:
    parameter = own.get(name)
    if parameter is None or not parameter.is_floating_point():
        raise Refused(
            f"the adapter {directory} does not fit its base model: it holds {name}, which is neither a low-rank "
            "matrix nor a weight of the base that can be replaced; merge it into its base with peft first"
        )
    if parameter.shape != tensor.shape:
        raise Refused(
            f"the adapter in {directory} is for another model: {name} is {list(tensor.shape)} there, "
            f"{list(parameter.shape)} here"
        )
    value = tensor.to(parameter.device, parameter.dtype)
    twins = [other for other, found in own.items() if found is parameter and other != name]
    if twins and not torch.equal(parameter, value):
        raise Refused(
            f"the adapter {directory} holds a {name} of its own, one matrix with {twins[0]} in its base model: "
            "merge it into its base with peft first"
        )
    parameter.copy_(value)


def refuse_other_shapes(model: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    """An adapter of another size, or for another base: peft's own message is a traceback of a page."""
    ours = {
        name.replace(f".{POLICY}.", ".").removesuffix(f".{POLICY}"): parameter.shape
        for name, parameter in model.named_parameters()
    }
    for name, tensor in tensors.items():
        shape = ours.get(name)
        if shape is not None and shape != tensor.shape:
            raise Refused(
                f"the adapter in {directory} is for another model: {name} is {list(tensor.shape)} there, "
                f"{list(shape)} here"
            )
