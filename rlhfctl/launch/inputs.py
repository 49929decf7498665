"""Which bytes a run learns from: hashes of its data, models, tokenizer and chat template, kept in launch.json.

A resumed run goes on at a place in its data. In another file that place means nothing, and nobody would see it; nor a
reference or a reward model whose directory holds other weights by now. A reward function may be mended: that is told.
"""

import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfctl.base_weights import fingerprint
from rlhfctl.errors import UsageError
from rlhfctl.preflight.inputs import locate
from rlhfctl.recipe.sections import ModelSource, PythonSource
from rlhfctl.recipe.tasks import OreoRecipe, PpoRecipe
from rlhfctl.run_dir import RunDir

if TYPE_CHECKING:
    from rlhfctl.recipe.tasks import AnyRecipe

OF_A_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def hashes(recipe: "AnyRecipe") -> dict[str, str]:
    """sha256 of each file and of the weights in each directory, by its path as the recipe gives it. Data of the hub and
    what is not there is left out."""
    found = {str(path): sha256(path) for path in dict.fromkeys(files(recipe)) if path.is_file()}
    for model in dict.fromkeys(models(recipe)):
        place = locate(model)
        if place is not None:
            found[model] = fingerprint(place)
    return found


def files(recipe: "AnyRecipe") -> Iterator[Path]:
    prompts = recipe.value_fit.prompts if isinstance(recipe, OreoRecipe) and recipe.value_fit else None
    for source in (*recipe.data.train, *recipe.data.eval, *(prompts or [])):
        yield Path(source.path)
    policy = recipe.policy
    if policy.chat_template is not None:
        yield Path(policy.chat_template)
    for model in (policy.path or policy.from_config, policy.tokenizer, *reward_models(recipe)):
        place = locate(model) if model is not None else None
        if place is not None:
            yield from (place / name for name in OF_A_MODEL)
    yield from reward_functions(recipe)


def models(recipe: "AnyRecipe") -> Iterator[str]:
    """Whose weights every attempt reads again: they stand still, and no checkpoint holds them. The base of the policy's
    adapter is told by the checkpoint."""
    yield from reward_models(recipe)
    if not isinstance(recipe, PpoRecipe | OreoRecipe):
        return
    start, value = recipe.policy.path, recipe.value_model
    frozen: list[str | None] = []
    if isinstance(recipe, OreoRecipe) or recipe.algorithm.kl_coef > 0:
        frozen.append(recipe.reference or start)
    if isinstance(recipe, PpoRecipe) and recipe.algorithm.advantage == "prime":
        prm = recipe.implicit_prm
        frozen.append(start if prm is None or prm.path is None else prm.path)
    if value is not None and value.lora is not None and value.init != "reward_model":
        frozen.append(start if value.init == "policy" else value.init)
    yield from (model for model in frozen if model is not None)


def reward_models(recipe: "AnyRecipe") -> Iterator[str]:
    sources = recipe.reward.sources if recipe.reward is not None else []
    yield from (source.path for source in sources if isinstance(source, ModelSource))


def reward_functions(recipe: "AnyRecipe") -> Iterator[Path]:
    sources = recipe.reward.sources if recipe.reward is not None else []
    yield from (Path(source.path) for source in sources if isinstance(source, PythonSource))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_inputs(
    recipe: "AnyRecipe", run: RunDir, before: dict[str, str], now: dict[str, str]
) -> list[str]:
    """The reward functions that are not what the run called when it was last started. Raises UsageError where anything
    else is not what it read then."""
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    functions = [str(path) for path in reward_functions(recipe)]
    refused = [path for path in changed if path not in functions]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UsageError(
            f"{', '.join(refused[:3])}{more} changed since the run in {shlex.quote(str(run.path))} was last started: "
            "put it back as it was, or start a new run in another --run-dir"
        )
    return [path for path in changed if path in functions]
