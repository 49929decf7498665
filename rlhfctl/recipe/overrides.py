"""`KEY=VALUE` from the command line: KEY a dotted path into the recipe, VALUE one YAML 1.2 node."""

import re
from typing import Any

from rlhfctl.recipe.errors import Place, Problem, RecipeError
from rlhfctl.recipe.tree import Tree
from rlhfctl.recipe.yaml12 import Path, parse

KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*")


def apply_overrides(tree: Tree, overrides: list[str] | tuple[str, ...]) -> list[Problem]:
    """Change the tree in the order given; what cannot be applied comes back as problems.

    Whether a key exists and takes the value is the schema's business, after this.
    """
    problems: list[Problem] = []
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        place = Place("", override=override)
        if not equals or not KEY.fullmatch(key):
            problems.append(Problem("not KEY=VALUE, such as optim.lr=1e-5", place))
        elif key in seen:
            problems.append(Problem(f"{key} is given twice", place, key))
        else:
            seen.add(key)
            problems += apply(tree, key, text, override)
    return problems


def apply(tree: Tree, key: str, text: str, override: str) -> list[Problem]:
    place = Place("", override=override)
    try:
        document = parse(text, "", override)
    except RecipeError as error:
        return [Problem(problem.message, place, key) for problem in error.problems]
    document.keys[()] = document.values[()] = place
    path = open_path(tree, key.split("."))
    if isinstance(path, str):
        return [Problem(path, place, key)]
    tree.graft(path, document.value, document)
    return [Problem(problem.message, place, key) for problem in document.problems]


def open_path(tree: Tree, parts: list[str]) -> Path | str:
    """The path with list indices as numbers, sections on the way made where they are absent; a sentence if there
    is no way."""
    path: list[str | int] = []
    current: Any = tree.root
    for number, part in enumerate(parts):
        before = ".".join(parts[:number])
        if isinstance(current, list):
            if not part.isdecimal():
                return f"{before} is a list: its items are {before}.0, {before}.1, ..."
            step: str | int = int(part)
            if int(part) > len(current):
                return f"{before} has {len(current)} item{'s' * (len(current) != 1)}: there is no {before}.{part}"
        elif isinstance(current, dict):
            step = part
        else:
            return f"{before} is a value, not a section: it has no {part}"
        path.append(step)
        if number == len(parts) - 1:
            return tuple(path)
        current = enter(current, step, [] if parts[number + 1].isdecimal() else {})
    return tuple(path)


def enter(current: Any, step: str | int, empty: Any) -> Any:
    """The section or list at `step`, made where there is none."""
    if isinstance(current, list):
        if step == len(current):
            current.append(empty)
    elif current.get(step) is None:
        current[step] = empty
    return current[step]
