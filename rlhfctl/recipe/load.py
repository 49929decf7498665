"""From a file, a shipped name or stdin, and overrides, to a checked recipe; and back to resolved YAML."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError

from rlhfctl.errors import UsageError
from rlhfctl.recipe import yaml12
from rlhfctl.recipe.catalogue import shipped_names, shipped_path
from rlhfctl.recipe.errors import Place, Problem, RecipeError
from rlhfctl.recipe.explain import one_of, problems_of, shown
from rlhfctl.recipe.overrides import apply_overrides
from rlhfctl.recipe.paths import resolve_paths
from rlhfctl.recipe.tasks import TASKS, AnyRecipe
from rlhfctl.recipe.tree import Tree, merge

STDIN = "<stdin>"


@dataclass(slots=True)
class Loaded:
    """path: the file, None for stdin. name: as the user gave it. tree: the values as given, with their places."""

    recipe: AnyRecipe
    path: Path | None
    name: str
    tree: Tree

    def place(self, key: str) -> str | None:
        """`file:line:column` (or the override) that gave a dotted key, or the section around it."""
        path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        place = self.tree.place(path)
        return str(place) if place else None


def load_recipe(source: str, overrides: Sequence[str] = (), task: str | None = None) -> Loaded:
    """source: a path, a shipped name, or `-` for stdin. task: the command's, which the recipe must be of.

    Raises RecipeError with everything that is wrong with the recipe, UsageError where there is none.
    """
    text, path = read_source(source)
    problems: list[Problem] = []
    tree = read_tree(text, path, problems, [])
    problems += apply_overrides(tree, tuple(overrides))
    own_task = checked_task(tree, problems)
    if task is not None and own_task != task:
        raise UsageError(wrong_command(source, own_task, task, tree.place(("task",))))
    problems += resolve_paths(tree)
    return Loaded(validated(tree, own_task, problems), path, source, tree)


def read_resolved(path: str | Path) -> AnyRecipe:
    """The recipe.yaml of a run directory."""
    return load_recipe(str(path)).recipe


def dump(recipe: AnyRecipe) -> str:
    """Every key with its value, defaults too, as YAML that loads to the same recipe."""
    values = recipe.model_dump(mode="json")
    return yaml12.dump({"task": values.pop("task"), **values})


def read_source(source: str) -> tuple[str, Path | None]:
    if source == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed: give it a recipe, or name one")
        return decode(sys.stdin.buffer.read(), STDIN), None
    path = Path(source)
    if path.is_dir() and not shipped_path(source):
        inside = path / "recipe.yaml"
        raise UsageError(
            f"{source} is a directory: " + (f"give {inside}" if inside.exists() else "give a recipe file")
        )
    if not path.exists():
        shipped = shipped_path(source)
        if shipped is None:
            raise UsageError(no_recipe(source))
        path = shipped
    try:
        return decode(path.read_bytes(), shown_path(path)), path
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}") from None


def no_recipe(source: str) -> str:
    near = get_close_matches(source.removesuffix(".yaml"), shipped_names(), 1, 0.6)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"there is no file and no shipped recipe {source}{meant} (rlhfctl recipes list)"


def shown_path(path: Path) -> str:
    """As short as it can be opened from here."""
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative


def decode(raw: bytes, file: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start)
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        raise RecipeError([Problem("not UTF-8 text", Place(file, line + 1, column + 1))]) from None


def read_tree(text: str, path: Path | None, problems: list[Problem], chain: list[Path]) -> Tree:
    """A recipe's values over those of the recipe it extends. chain: the files that led here."""
    document = yaml12.parse(text, shown_path(path) if path else STDIN)
    problems += document.problems
    file = shown_path(path) if path else STDIN
    if not isinstance(document.value, dict):
        what = "empty" if document.value is None else f"{shown(document.value)}, not sections of KEY: VALUE"
        raise RecipeError([Problem(f"the recipe is {what}", document.values.get((), Place(file, 1, 1)))])
    tree = Tree(document.value, document.keys, document.values)
    if "extends" not in tree.root:
        return tree
    base, place = tree.root.pop("extends"), tree.values[("extends",)]
    if not isinstance(base, str) or not base:
        raise RecipeError([*problems, Problem("extends must be a shipped name or a path", place, "extends")])
    found = find_base(base, path)
    chain = [*chain, *([path.resolve()] if path else [])]
    if found is None:
        near = get_close_matches(base, shipped_names(), 1, 0.6)
        message = f"extends: there is no file and no shipped recipe {base}"
        raise RecipeError([*problems, Problem(message, place, "extends", near[0] if near else None)])
    if found.resolve() in chain:
        circle = " -> ".join(shown_path(step) for step in [*chain, found])
        raise RecipeError([*problems, Problem(f"extends goes in a circle: {circle}", place, "extends")])
    try:
        inherited = decode(found.read_bytes(), shown_path(found))
    except OSError as error:
        message = f"extends: cannot read {base}: {error.strerror}"
        raise RecipeError([*problems, Problem(message, place, "extends")]) from None
    return merge(read_tree(inherited, found, problems, chain), tree)


def find_base(name: str, path: Path | None) -> Path | None:
    """Beside the recipe that extends it, in the current directory, or shipped."""
    if "\0" in name:
        return None
    name = os.path.expanduser(name)
    beside = [path.parent / name] if path else []
    return next((found for found in [*beside, Path(name)] if found.is_file()), shipped_path(name))


def checked_task(tree: Tree, problems: list[Problem]) -> str:
    """The recipe's task. Raises RecipeError where there is none: without it nothing else can be checked."""
    task, place = tree.root.get("task"), tree.place(("task",))
    near: list[str] = []
    if isinstance(task, str) and task in TASKS:
        return task
    if "task" not in tree.root:
        message = f"missing key task: {one_of(TASKS)}"
    else:
        message = f"task must be {one_of(TASKS)}, not {shown(task)}"
        near = get_close_matches(str(task), TASKS, 1, 0.5)
    raise RecipeError([*problems, Problem(message, place, "task", near[0] if near else None)])


def wrong_command(source: str, own_task: str, task: str, place: Place | None) -> str:
    """One sentence that names the right command, or the override that asks for another task than the command's."""
    if place is not None and place.override is not None:
        return (
            f"override {place.override}: `rlhfctl {task}` trains a recipe of {task}; leave the override out"
        )
    return f"{source} is a recipe of {own_task}, not of {task}: run `rlhfctl {own_task} {source}`"


def validated(tree: Tree, task: str, problems: list[Problem]) -> AnyRecipe:
    """The recipe, strictly: no string passes for a number, no number for a string."""
    try:
        # Through JSON: there a list is what a tuple is written as, also in strict mode.
        recipe = TASKS[task].model_validate_json(json.dumps(tree.root), strict=True)
    except ValidationError as error:
        problems = [*problems, *problems_of(error.errors(include_url=False), tree, task)]
    if problems:
        raise RecipeError(problems)
    return recipe
