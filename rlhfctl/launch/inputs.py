"""Which bytes a run learns from: hashes of its data, configuration, tokenizer and chat template, kept in launch.json.

A resumed run goes on at a place in its data. In another file that place means nothing, and nobody would see it.
"""

import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfctl.errors import UsageError
from rlhfctl.preflight.inputs import locate
from rlhfctl.run_dir import RunDir

if TYPE_CHECKING:
    from rlhfctl.recipe.tasks import AnyRecipe

OF_A_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def hashes(recipe: "AnyRecipe") -> dict[str, str]:
    """sha256 of each file, by its path as the recipe gives it. Data of the hub and what is not there is left out."""
    return {str(path): sha256(path) for path in dict.fromkeys(files(recipe)) if path.is_file()}


def files(recipe: "AnyRecipe") -> Iterator[Path]:
    for source in (*recipe.data.train, *recipe.data.eval):
        yield Path(source.path)
    policy = recipe.policy
    if policy.chat_template is not None:
        yield Path(policy.chat_template)
    for model in (policy.path or policy.from_config, policy.tokenizer):
        place = locate(model) if model is not None else None
        if place is not None:
            yield from (place / name for name in OF_A_MODEL)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_inputs(run: RunDir, before: dict[str, str], now: dict[str, str]) -> None:
    """Raises UsageError where a file is not what the run read when it was last started."""
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"{', '.join(changed[:3])}{more} changed since the run in {shlex.quote(str(run.path))} was last started: "
            "put it back as it was, or start a new run in another --run-dir"
        )
