"""Write a policy the way from_pretrained reads it, tokenizer and chat template beside it."""

import copy
import json
import shutil
from pathlib import Path

import torch
from torch import nn

from rlhfctl.checkpoint_files import weight_files
from rlhfctl.errors import Refused
from rlhfctl.models.adapter_base import is_adapter, write_base
from rlhfctl.models.adapter_weights import put_adapter, read_adapter
from rlhfctl.models.load import config_of
from rlhfctl.models.merged import make_dense
from rlhfctl.recipe.sections import Policy
from rlhfctl.templates.lock import write_lock

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def export_policy(model: nn.Module, policy: Policy, directory: Path, merge: bool) -> None:
    """merge: fold LoRA adapters into the weights; otherwise an adapter model saves its adapter alone."""
    directory.mkdir(parents=True, exist_ok=True)
    if merge:
        model = merged_copy(model)
    save_portable(model, directory)
    if policy.lora is not None and not merge and policy.path is not None:
        write_base(policy, directory)
    copy_tokenizer(policy, directory)


def save_portable(model: nn.Module, directory: Path) -> None:
    """save_pretrained without the name of our attention, which is unknown to whoever loads it."""
    attention = config_of(model)._attn_implementation
    config_of(model)._attn_implementation = "sdpa"
    try:
        model.save_pretrained(directory)  # type: ignore[operator]
    finally:
        config_of(model)._attn_implementation = attention


def merged_copy(model: nn.Module) -> nn.Module:
    """Ordinary matrices throughout: W + (alpha / rank) B A, of a quantised layer with its dequantised W."""
    merged = copy.deepcopy(model)
    make_dense(merged)
    merged._hf_peft_config_loaded = False  # type: ignore[assignment]
    return merged


def copy_tokenizer(policy: Policy, directory: Path) -> None:
    """Byte for byte: the tokenizer that trained is the tokenizer that serves."""
    source = policy.tokenizer or policy.path
    assert source is not None
    if Path(source).is_dir():
        for name in TOKENIZER_FILES:
            file = Path(source) / name
            if file.is_file():
                shutil.copyfile(file, directory / name)
        extra = Path(source) / "additional_chat_templates"
        if extra.is_dir():
            shutil.copytree(extra, directory / extra.name, dirs_exist_ok=True)
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    if policy.chat_template is not None:
        shutil.copyfile(policy.chat_template, directory / "chat_template.jinja")
        drop_template(directory / "tokenizer_config.json")
    write_lock(directory, policy.template_kwargs)


def drop_template(config: Path) -> None:
    """Old servers read the template here and nowhere else: none is better than the one that was not trained."""
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        if values.pop("chat_template", None) is not None:
            config.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_trainable(model: nn.Module, directory: Path) -> None:
    """Read a checkpoint's policy/ back into a model that was built the same way; exact, or Refused."""
    from safetensors.torch import load_file

    if is_adapter(directory):
        put_adapter(model, read_adapter(directory), directory)
        return
    tensors = {}
    for file in weight_files(directory):
        tensors.update(load_file(file))
    parameters = dict(model.named_parameters())
    lost = sorted(set(parameters) - set(tensors))
    if lost:
        raise Refused(f"{directory} lacks {lost[0]}: it is not a checkpoint of this model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
