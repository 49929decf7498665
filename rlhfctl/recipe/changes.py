"""Which keys differ between a run's recipe and the one it is to be continued with, and which of them may."""

import re
from typing import Any

from rlhfctl.recipe.explain import shown
from rlhfctl.recipe.tasks import AnyRecipe

# How long, how often, in which portions, and where a service listens: what the finished steps learnt stays as it is.
# Everything else would make one run of two different ones.
MAY_CHANGE = (
    "name",
    "algorithm.kl_limit",
    "algorithm.reference_cache_dir",
    "guard",
    "launch",
    "policy.attention",
    "policy.gradient_checkpointing",
    "reward.max_failures",
    "reward.sources.*.url",
    "reward.sources.*.urls",
    "rollout.max_batch_tokens",
    "rollout.server",
    "template.allow",
    "template.on_mismatch",
    "tracking",
    "train.epochs",
    "train.eval_every",
    "train.eval_samples",
    "train.keep_checkpoints",
    "train.log_every",
    "train.samples_every",
    "train.samples_per_step",
    "train.save_every",
    "train.steps",
    "train.tokens_per_microbatch",
)


def changes(before: AnyRecipe, after: AnyRecipe) -> dict[str, str]:
    """Dotted keys that differ, each with `old -> new`."""
    old, new = flat(before.model_dump(mode="json"), ""), flat(after.model_dump(mode="json"), "")
    keys = [*old, *(key for key in new if key not in old)]
    differ = [key for key in keys if old.get(key) != new.get(key)]
    return {key: f"{shown(old.get(key))} -> {shown(new.get(key))}" for key in differ}


def may_change(key: str) -> bool:
    """key: dotted, items of a list by their place."""
    key = re.sub(r"\.\d+", ".*", key)
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def flat(value: Any, prefix: str) -> dict[str, Any]:
    """Dotted keys to plain values; an empty section or list is a value."""
    if isinstance(value, dict) and value:
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, inner in items for key, leaf in flat(inner, f"{prefix}{name}.").items()}
