"""Which keys hold paths, and what they are relative to.

A path given in a recipe or on the command line is relative to the current directory, as the shell completes it. Files
that come with a recipe are also looked for beside the recipe that names them: a reward function or a chat template
there first, data there last. What exists becomes absolute, so that a run directory can be resumed from anywhere; the
rest stays as it is: a hub id, or what preflight reports.
"""

import os
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from rlhfctl.errors import impossible_path
from rlhfctl.recipe.errors import Problem

if TYPE_CHECKING:  # a completion reads no YAML
    from rlhfctl.recipe.tree import Tree
    from rlhfctl.recipe.yaml12 import Path

PATHS = (
    "policy.path",
    "policy.from_config",
    "policy.tokenizer",
    "policy.chat_template",
    "reference",
    "value_model.init",
    "algorithm.reference_cache_dir",
    "implicit_prm.path",
    "launch.hostfile",
    "rollout.server.sync_dir",
    "reward.sources.*.path",
    "data.train.*.path",
    "data.eval.*.path",
    "value_fit.prompts.*.path",
)
BESIDE_FIRST = ("policy.chat_template", "reward.sources.*.path")
BESIDE_LAST = ("data.train.*.path", "data.eval.*.path", "value_fit.prompts.*.path")
WORDS = {"value_model.init": ("policy", "reward_model")}


def resolve_paths(tree: "Tree") -> list[Problem]:
    """Make the paths in the tree absolute where they exist; returns those that no file can have."""
    problems = []
    for pattern in PATHS:
        for path in matches(tree.root, tuple(pattern.split(".")), ()):
            container: Any = tree.root
            for part in path[:-1]:
                container = container[part]
            value = container[path[-1]]
            if isinstance(value, str) and value not in WORDS.get(pattern, ()):
                place = tree.place(path)
                if (wrong := fault(value)) is not None:
                    key = ".".join(map(str, path))
                    problems.append(Problem(f"{key}: {wrong}", place, key))
                    continue
                beside = [FilePath(place.file).parent] if place is not None and place.file else []
                first, last = beside * (pattern in BESIDE_FIRST), beside * (pattern in BESIDE_LAST)
                container[path[-1]] = resolved(value, [*first, FilePath(), *last])
    return problems


def fault(value: str) -> str | None:
    """Why this can be no path, whatever is there: an empty one would mean the current directory."""
    if not value:
        return "an empty path: name a file or directory, or leave the key out"
    try:
        os.stat(os.path.expanduser(value))
    except ValueError:
        return f"{value!r} cannot be a file or a directory: it holds a character that no name has"
    except OSError as error:
        return impossible_path(error)
    return None


def resolved(value: str, bases: list[FilePath]) -> str:
    expanded = os.path.expanduser(value)
    for base in bases:
        if os.path.exists(base / expanded):
            return os.path.abspath(base / expanded)
    return expanded


def matches(value: Any, pattern: tuple[str, ...], path: "Path") -> Iterator["Path"]:
    """The paths of a tree that a dotted pattern with `*` for list indices names."""
    if not pattern:
        yield path
    elif pattern[0] == "*" and isinstance(value, list):
        for index, item in enumerate(value):
            yield from matches(item, pattern[1:], (*path, index))
    elif isinstance(value, dict) and pattern[0] in value:
        yield from matches(value[pattern[0]], pattern[1:], (*path, pattern[0]))
