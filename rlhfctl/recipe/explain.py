"""pydantic's errors as problems in the recipe's own terms, each at the place of the key or value it is about."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from rlhfctl.recipe.base import NAME
from rlhfctl.recipe.errors import Problem
from rlhfctl.recipe.keys import keys_of, names_at
from rlhfctl.recipe.tasks import TASKS
from rlhfctl.recipe.tree import Tree
from rlhfctl.recipe.yaml12 import Path, dotted

DISCRIMINATOR = "kind"
WANTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (KEY: VALUE)",
    "model_type": "a section (KEY: VALUE)",
    "model_attributes_type": "a section (KEY: VALUE)",
}
PATTERNS = {NAME: "letters, digits, dots, dashes and underscores, and not dots alone"}
BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def problems_of(errors: Iterable[Any], tree: Tree, task: str) -> list[Problem]:
    """errors: what ValidationError.errors() lists. The branches of a union that one value failed are one problem."""
    located = [(locate(error["loc"], tree.root, error["type"] == "missing"), error) for error in errors]
    grouped = groupby(located, key=lambda pair: pair[0])
    return [
        problem
        for path, group in grouped
        for problem in explain(path, [error for _, error in group], tree, task)
    ]


def locate(loc: tuple[str | int, ...], root: Any, last_is_absent: bool) -> Path:
    """The recipe's path for pydantic's: tags of discriminated unions and names of union branches dropped."""
    path: list[str | int] = []
    current, tagged = root, False
    for number, part in enumerate(loc):
        absent = last_is_absent and number == len(loc) - 1
        if isinstance(current, dict):
            in_list = number > 0 and isinstance(loc[number - 1], int)
            if in_list and not tagged and part == current.get(DISCRIMINATOR):
                tagged = True
            elif part in current or absent:
                path.append(part)
                current, tagged = current.get(part), False
        elif isinstance(current, list) and isinstance(part, int):
            path.append(part)
            current, tagged = current[part] if part < len(current) else None, False
    return tuple(path)


def explain(path: Path, errors: list[Any], tree: Tree, task: str) -> list[Problem]:
    """One problem; of a rule that found several things wrong, one for each line it says."""
    if errors[0]["type"] == "value_error":
        return [disagreement(path, said, tree) for said in str(errors[0]["ctx"]["error"]).splitlines()]
    return [explain_value(path, errors, tree, task)]


def explain_value(path: Path, errors: list[Any], tree: Tree, task: str) -> Problem:
    first, key = errors[0], dotted(path)
    kind, given = first["type"], first["input"]
    if kind == "extra_forbidden":
        return unknown_key(path, tree, task)
    if kind == "missing":
        return missing(path, tree, task)
    if kind == "union_tag_not_found":
        return Problem(f"missing key {key}.{DISCRIMINATOR}", tree.place(path, of_key=True), key)
    if kind == "union_tag_invalid":
        path = (*path, DISCRIMINATOR)
        given, key = first["ctx"]["tag"], dotted(path)
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected_tags"])
        return wrong_value(path, one_of(choices), given, choices, tree)
    choices = [choice for error in errors for choice in choices_of(error)]
    wishes = list(dict.fromkeys(wanted(error) for error in errors))
    return wrong_value(path, " or ".join(wishes), given, choices, tree)


def unknown_key(path: Path, tree: Tree, task: str) -> Problem:
    key, place = dotted(path), tree.place(path, of_key=True)
    others = [name for name, schema in TASKS.items() if name != task and path[0] in schema.model_fields]
    if len(path) == 1 and others:
        return Problem(f"{key} is for {' and '.join(others)}, and this is a recipe of {task}", place, key)
    if key_in_schema(path, task):
        kind: Any = tree.root
        for part in path[:-1]:
            kind = kind[part]
        return Problem(f"{key} is no key of {DISCRIMINATOR} {kind.get(DISCRIMINATOR)}", place, key)
    return Problem(f"unknown key {key}", place, key, meant_key(path, task))


def key_in_schema(path: Path, task: str) -> bool:
    """Whether another kind of the same list item has this key."""
    return str(path[-1]) in names_at(task, path[:-1])


def meant_key(path: Path, task: str) -> str | None:
    """A near name in the same section, else the same or a near name anywhere in the schema."""
    name = str(path[-1])
    near = get_close_matches(name, names_at(task, path[:-1]), 1, 0.6)
    if near:
        return dotted((*path[:-1], near[0]))
    leaves: dict[str, str] = {}
    for key in keys_of(task):
        leaves.setdefault(key.path.rsplit(".", 1)[-1], key.path)
    near = get_close_matches(name, leaves, 1, 0.8)
    return leaves[near[0]] if near else None


def missing(path: Path, tree: Tree, task: str) -> Problem:
    key = dotted(path)
    if isinstance(path[-1], int):
        short = path[:-1]
        return Problem(
            f"{dotted(short)} needs {path[-1] + 1} items or more", tree.place(short), dotted(short)
        )
    return Problem(f"missing key {key}", tree.place(path[:-1], of_key=True), key)


def wrong_value(path: Path, wish: str, given: Any, choices: list[str], tree: Tree) -> Problem:
    key, place = dotted(path), tree.place(path)
    hint = ""
    if wish == "true or false" and str(given).lower() in ("yes", "no", "on", "off"):
        hint = " (YAML 1.2 has only true and false)"
    elif wish == "a string" and isinstance(given, int | float):
        hint = ": put quotes around it"
    near = get_close_matches(given, choices, 1, 0.6) if isinstance(given, str) else []
    return Problem(f"{key} must be {wish}, not {shown(given)}{hint}", place, key, near[0] if near else None)


def disagreement(path: Path, said: str, tree: Tree) -> Problem:
    """A rule between keys: at the first key it names that is given, the last override among them before others. A
    section is named by the first word, where no key is."""
    dotted_names = re.findall(r"\b[a-z_]+(?:\.[a-z_0-9]+)+\b", said)
    names = [*dotted_names, *([] if path else said.split()[:1])]
    named: list[Path] = [
        tuple(int(part) if part.isdigit() else part for part in name.split(".")) for name in names
    ]
    given = [name for name in named if name in tree.values]
    given.sort(key=lambda name: tree.values[name].override is None)
    at = given[0] if given else path
    return Problem(said, tree.place(at, of_key=True), dotted(at))


def wanted(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in WANTED:
        return WANTED[kind]
    if kind in BOUNDS:
        bound, words = BOUNDS[kind]
        return (
            f"{words} {context[bound]:g}"
            if isinstance(context[bound], float)
            else f"{words} {context[bound]}"
        )
    if kind == "literal_error":
        return one_of(choices_of(error))
    if kind == "too_short":
        return f"a list of {context['min_length']} or more"
    if kind == "too_long":
        return f"a list of {context['max_length']} at most"
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(context["pattern"], context["pattern"])
    return str(error["msg"])


def choices_of(error: Any) -> list[str]:
    """Of a literal: words stand in quotes, numbers without."""
    if error["type"] != "literal_error":
        return []
    return [word or number for word, number in re.findall(r"'([^']*)'|(\d+)", error["ctx"]["expected"])]


def one_of(choices: Iterable[str]) -> str:
    listed = list(choices)
    return listed[0] if len(listed) == 1 else f"one of {', '.join(listed)}"


def shown(value: Any) -> str:
    """A value as the recipe writes it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}..."'
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return str(value)
