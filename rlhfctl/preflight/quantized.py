"""Weights in 8 or 4 bits under an adapter: what cannot be quantised, and what an adapter does not fit (W020...)."""

import json
from collections.abc import Iterator
from typing import Any

from rlhfctl.base_weights import refuse_other_base
from rlhfctl.errors import Refused
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, locate


def check(inputs: Inputs) -> Iterator[Finding]:
    policy = inputs.recipe.policy
    if policy.path is None or locate(policy.path) is None:
        return  # reported elsewhere
    if (inputs.directory(policy.path) / "adapter_config.json").is_file():
        yield refusal(
            "W022",
            f"policy.path: {policy.path} is an adapter, not a model",
            "a new adapter, or all weights, would be trained over weights that are not there",
            "point to the merged model (policy.lora.merge_final: true writes one), or to the adapter's base",
        )
        return
    if policy.lora is not None:
        yield from changed_base(inputs)
    for key, path in {"policy.path": policy.path, **inputs.started_from}.items():
        yield from quantised_already(inputs, key, path)
    if policy.quantization == "none" or quantization_of(inputs, policy.path):
        return
    uneven = uneven_matrices(inputs)
    if policy.quantization != "int8" and uneven:
        name, columns = uneven[0]
        yield refusal(
            "W021",
            f"policy.quantization_block {policy.quantization_block} does not divide the {columns} columns of {name}",
            f"{len(uneven)} matrices; their weights would be read back with the scales of others",
            "lower policy.quantization_block, or use int8",
        )


def quantised_already(inputs: Inputs, key: str, path: str) -> Iterator[Finding]:
    """W020: transformers loads such matrices as they are."""
    if quantization_of(inputs, path):
        yield refusal(
            "W020",
            f"{key}: {path} is quantised already",
            "its config.json has a quantization_config: its matrices take no gradient, so only the rest would be "
            "trained, and nothing could be merged into them or saved",
            "point to the weights as they were before; policy.quantization puts them in 8 or 4 bits under an adapter",
        )


def quantization_of(inputs: Inputs, path: str) -> dict[str, Any]:
    """Empty where weights are kept whole: also those that are rounded anew in every pass (BitNet's for training)."""
    given = inputs.config(path).get("quantization_config")
    if not isinstance(given, dict) or given.get("quantization_mode") == "online":
        return {}
    return given


def changed_base(inputs: Inputs) -> Iterator[Finding]:
    """W023: a run to be resumed, whose adapter stands on weights that are no longer there."""
    states = sorted(inputs.run_dir.glob("checkpoints/step_*/trainer.json")) if inputs.run_dir else []
    if not states:
        return
    try:
        facts = json.loads(states[-1].read_text()).get("base", {})
        # Of a later phase the base is the model of the phase before, not policy.path.
        refuse_other_base(facts, facts.get("path", inputs.policy_path), states[-1].parent)
    except (OSError, ValueError):
        return  # an unreadable checkpoint is reported by the worker
    except Refused as error:
        yield refusal("W023", "the adapter's base has changed", error.message, "")


def uneven_matrices(inputs: Inputs) -> list[tuple[str, int]]:
    """(name, columns) of the backbone's matrices whose rows are not whole blocks."""
    block = inputs.recipe.policy.quantization_block
    return [
        (name, entry.shape[1])
        for name, entry in inputs.checkpoint(inputs.policy_path).tensors.items()
        if len(entry.shape) == 2 and ".layers." in name and entry.shape[1] % block
    ]


def saved_bytes(inputs: Inputs, width: int) -> int:
    """Bytes that quantisation takes off the backbone's matrices, kept in `width` bytes a weight otherwise."""
    policy = inputs.recipe.policy
    if policy.quantization == "none" or policy.path is None:
        return 0
    weights = sum(
        entry.shape[0] * entry.shape[1]
        for name, entry in inputs.checkpoint(policy.path).tensors.items()
        if len(entry.shape) == 2 and ".layers." in name
    )
    kept = 1.0 if policy.quantization == "int8" else 0.5 + 4 / policy.quantization_block
    return int(weights * (width - kept))


def refusal(id: str, title: str, detail: str, fix: str) -> Finding:
    return Finding(id, "error", title, detail, fix, side="policy", exit_code=5)
