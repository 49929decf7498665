"""Write a trained reward model the way transformers reads it.

last_token          AutoModelForSequenceClassification, one label: its logits are the scores
token_sum, step_end AutoModelForTokenClassification, one label: logits of every token, to be summed over the response
                    or read at the ends of the steps
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rlhfctl.models.adapter_base import write_base
from rlhfctl.models.encoder_training import is_encoder_config
from rlhfctl.models.export import copy_tokenizer, merged_copy, save_portable
from rlhfctl.models.load import backbone, config_of
from rlhfctl.models.reward_adapter import save_adapter
from rlhfctl.recipe.sections import Policy


@dataclass(frozen=True, slots=True)
class RewardFacts:
    """read: how the score is read; pad: the token that is never read at the end. mean and std: of scores on held-out
    answers, None where there are none."""

    objective: str
    read: str
    pad: int | None
    separator: str
    mean: float | None = None
    std: float | None = None


def export_reward_model(
    model: nn.Module, policy: Policy, facts: RewardFacts, directory: Path, merge: bool
) -> None:
    """merge: fold LoRA adapters into the weights; otherwise a model with adapters writes them and the head alone."""
    directory.mkdir(parents=True, exist_ok=True)
    config = config_of(model)
    describe(config, facts)
    if policy.lora is not None and not merge:
        assert policy.path is not None
        save_adapter(model, backbone(model), policy.path, directory)
        write_base(policy, directory)
        config.architectures = [type(model).__name__]
        config.save_pretrained(directory)
    else:
        if policy.lora is not None:
            model = merged_copy(model)
        save_portable(model, directory)
    path = directory / "config.json"
    written: dict[str, Any] = json.loads(path.read_text())
    if facts.read != "last_token":
        name = type(model).__name__.replace("ForSequenceClassification", "ForTokenClassification")
        written["architectures"] = [name]
        written["token_classification_bias"] = False
    for key in ("attn_implementation", "_attn_implementation"):
        written.pop(key, None)
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(policy, directory)


def describe(config: Any, facts: RewardFacts) -> None:
    """What a loader, ours or another, needs to know of the head."""
    config.num_labels = 1
    config.id2label, config.label2id = {0: "score"}, {"score": 0}
    config.problem_type = "regression"
    config.pad_token_id = facts.pad
    config.use_cache = False
    if not is_encoder_config(config):
        config.value_head_prefix = "score"  # OpenRLHF's key
    config.normalize_reward = False
    for name in ("mean", "std"):
        if getattr(facts, name) is not None:
            setattr(config, name, getattr(facts, name))
        elif hasattr(config, name):
            delattr(config, name)  # of the model that training started from
    config.reward_model = {
        "objective": facts.objective,
        "read": facts.read,
        "step_separator": facts.separator,
    }
