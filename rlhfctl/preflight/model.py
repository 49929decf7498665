"""The models a recipe names: are they here, whole, and what the recipe says they are (W...)."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhfctl.errors import RlhfctlError
from rlhfctl.preflight.architecture import check_architecture
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, locate, looks_like_hub_id
from rlhfctl.preflight.weights import Checkpoint, Entry, read_floats
from rlhfctl.recipe.tasks import OreoRecipe, PpoRecipe

LANGUAGE_MODELS = ("policy.path", "policy.from_config", "reference", "implicit_prm.path")


def check(inputs: Inputs) -> Iterator[Finding]:
    for key, path, weights in named_models(inputs):
        yield from check_place(key, path)
        if locate(path) is not None:
            yield from check_files(inputs, key, path, weights)
    for source in inputs.reward_models:
        if locate(source.path) is not None:
            yield from check_head(inputs, source.path)
    yield from check_options(inputs)


def named_models(inputs: Inputs) -> list[tuple[str, str, bool]]:
    """(recipe key, path, whether weights are read from it)."""
    recipe = inputs.recipe
    policy = recipe.policy
    models = [
        ("policy.path", policy.path, True),
        ("policy.from_config", policy.from_config, False),
        ("policy.tokenizer", policy.tokenizer, False),
    ]
    if isinstance(recipe, PpoRecipe | OreoRecipe):
        models.append(("reference", recipe.reference, True))
        if recipe.value_model is not None and recipe.value_model.init not in ("policy", "reward_model"):
            models.append(("value_model.init", recipe.value_model.init, True))
        if isinstance(recipe, PpoRecipe) and recipe.implicit_prm is not None:
            models.append(("implicit_prm.path", recipe.implicit_prm.path, True))
    models += [("reward.sources", source.path, True) for source in inputs.reward_models]
    return [(key, path, weights) for key, path, weights in models if path is not None]


def check_place(key: str, path: str) -> list[Finding]:
    """W001 absent directory, W002 hub id that this machine cannot get. Of a hub id the small files are fetched."""
    if locate(path) is not None:
        return []
    if Path(path).exists():
        return [
            error("W001", f"{key}: {path} is a file", "a model is a directory with config.json", f"set {key}")
        ]
    if not looks_like_hub_id(path):
        return [
            error(
                "W001",
                f"{key}: {path} does not exist",
                "no such directory",
                f"set {key} to a model directory",
            )
        ]
    from rlhfctl.templates.files import resolve_directory
    from rlhfctl.templates.hub import hub_failure

    reason, fix = "HF_HUB_OFFLINE is set", f"set {key} to a local directory, or unset HF_HUB_OFFLINE"
    if not offline():
        try:
            resolve_directory(path)  # configuration, tokenizer and template: what the checks read
            return []
        except RlhfctlError as unreachable:
            reason, fix = hub_failure(unreachable.__cause__ or unreachable, path)
    return [not_here(key, path, reason, fix)]


def not_here(key: str, path: str, reason: str, fix: str) -> Finding:
    return error(
        "W002",
        f"{key}: {path} is not in the local hub cache and cannot be downloaded",
        reason,
        fix,
        exit_code=4,
    )


def offline() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def check_files(inputs: Inputs, key: str, path: str, weights: bool) -> list[Finding]:
    """W004 no configuration, W025 an architecture that packs would be wrong for, W005 no weights, W006 damaged ones."""
    directory = inputs.directory(path)
    if key == "policy.tokenizer":
        return []  # the template check reads it
    if not inputs.config(path) and not adapter(inputs, path):
        return [
            error(
                "W004", f"{key}: {path} has no config.json", f"looked in {directory}", f"set {key} to a model"
            )
        ]
    unlike = check_architecture(
        key, path, inputs.config(path), key in LANGUAGE_MODELS and inputs.recipe.task != "rm"
    )
    if unlike or not weights:
        return unlike
    checkpoint = inputs.checkpoint(path)
    if checkpoint.problems:
        return [
            error(
                "W006",
                f"{key}: the weights of {path} are damaged",
                "; ".join(checkpoint.problems[:3]),
                "copy or download the checkpoint again",
            )
        ]
    if checkpoint.empty and looks_like_hub_id(path):
        if offline():
            fix = f"set {key} to a local directory, or unset HF_HUB_OFFLINE"
            return [not_here(key, path, "its weights are not cached, and HF_HUB_OFFLINE is set", fix)]
        return [
            Finding(
                "W003",
                "info",
                f"{key}: the weights of {path} will be downloaded from the hub",
                "they are not in the local cache, so they were not checked",
                side="policy",
            )
        ]
    if checkpoint.empty and checkpoint.pickled:
        return [
            error(
                "W016",
                f"{key}: {path} holds its weights as pickles alone",
                "reading a pickle can run any code that its author put there, so none is read",
                "convert it where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
            )
        ]
    if checkpoint.empty:
        return [
            error(
                "W005",
                f"{key}: {path} holds no weights",
                f"no *.safetensors in {directory}",
                "point to a whole checkpoint; policy.from_config trains from random weights on purpose",
            )
        ]
    return []


def check_head(inputs: Inputs, path: str) -> list[Finding]:
    """W007 no head, W008 a head of the wrong shape, W009 one that is not finite or all zero."""
    checkpoint = inputs.checkpoint(path)
    if checkpoint.problems or not checkpoint.tensors:
        return []  # reported already
    config = inputs.config(path)
    names = head_names(config)
    entry = find_head(checkpoint, config)
    if entry is None:
        if adapter(inputs, path) or any(name.startswith("classifier.") for name in checkpoint.tensors):
            return []  # an adapter's base may hold the head, an encoder has its own: the worker reads them
        return [
            error(
                "W007",
                f"reward.sources: {path} holds no reward head",
                f"looked for {', '.join(names)}: a head filled with random numbers would give random rewards",
                "point to a reward model (backbone and head), not to a language model",
                side="rm",
            )
        ]
    return head_findings(
        "reward.sources", path, entry, config, "point to a reward model with one score", "rm"
    )


def head_names(config: dict[str, Any]) -> list[str]:
    """Where a head may lie: under the prefix that the configuration names, or a usual one."""
    names = [
        f"{config.get('value_head_prefix') or 'score'}.weight",
        "score.weight",
        "head.weight",
        "v_head.weight",
    ]
    return list(dict.fromkeys(names))


def find_head(checkpoint: Checkpoint, config: dict[str, Any]) -> Entry | None:
    """Names as in the model itself: peft puts `base_model.model.` and `modules_to_save` around them."""
    plain = {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".modules_to_save", ""): entry
        for name, entry in checkpoint.tensors.items()
    }
    return next((plain[name] for name in head_names(config) if name in plain), None)


def adapter(inputs: Inputs, path: str) -> bool:
    return (inputs.directory(path) / "adapter_config.json").is_file()


def head_findings(
    key: str, path: str, entry: Entry, config: dict[str, Any], fix: str, side: str = "policy"
) -> list[Finding]:
    hidden = config.get("hidden_size")
    # The two labels of a token classifier (wrong, right) make one score.
    two = any(str(name).endswith("ForTokenClassification") for name in config.get("architectures") or ())
    rows = (1, 2) if two else (1,)
    if (
        len(entry.shape) != 2
        or entry.shape[0] not in rows
        or (hidden is not None and entry.shape[1] != hidden)
    ):
        return [
            error(
                "W008",
                f"{key}: the head of {path} has shape {list(entry.shape)}",
                f"a reward head is [1, {hidden or 'hidden'}]",
                fix,
                side=side,
            )
        ]
    values = read_floats(entry)
    if values is None or (all(map(math.isfinite, values)) and any(values)):
        return []
    what = "all zeros: every score would be the same" if not any(values) else "not finite"
    return [
        error(
            "W009",
            f"{key}: the head of {path} is {what}",
            "",
            fix,
            side=side,
        )
    ]


def check_options(inputs: Inputs) -> list[Finding]:
    """W010 value_model.init without its model, W011 LoRA modules that do not exist, W012 foreign code."""
    recipe, findings = inputs.recipe, []
    value_model = recipe.value_model if isinstance(recipe, PpoRecipe) else None
    if value_model is not None and value_model.init == "reward_model" and not inputs.reward_models:
        findings.append(
            error(
                "W010",
                "value_model.init is reward_model, but no reward source is a model",
                "the recipe has no source of kind model",
                "set value_model.init to policy or to a checkpoint directory",
                exit_code=2,
            )
        )
    lora = recipe.policy.lora
    if lora is not None and lora.target_modules != "all-linear" and locate(inputs.policy_path) is not None:
        tensors = inputs.checkpoint(inputs.policy_path).tensors
        absent = [
            name for name in lora.target_modules if not any(f".{name}.weight" in f".{key}" for key in tensors)
        ]
        if absent and tensors:
            findings.append(
                error(
                    "W011",
                    f"policy.lora.target_modules: {', '.join(absent)} not in {inputs.policy_path}",
                    "no weight of the checkpoint has that module name",
                    "use all-linear, or the module names of this architecture",
                    exit_code=2,
                )
            )
    if recipe.policy.trust_remote_code:
        findings.append(
            Finding(
                "W012",
                "warning",
                f"policy.trust_remote_code: python code that comes with {inputs.policy_path} will run",
                fix="read it first, or use an architecture that transformers has",
                side="policy",
            )
        )
    return findings


def error(id: str, title: str, detail: str, fix: str, side: str = "policy", exit_code: int = 5) -> Finding:
    return Finding(id, "error", title, detail, fix, side, exit_code=exit_code)
