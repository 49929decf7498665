"""The keys of a task's schema, dotted, with what they may hold: for suggestions, overrides and completions."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from rlhfctl.recipe.tasks import TASKS

if TYPE_CHECKING:  # a completion reads no YAML
    from rlhfctl.recipe.yaml12 import Path


@dataclass(frozen=True, slots=True)
class Key:
    """path: dotted, list items as `0`. choices: the values it takes where they can be told, null and bools too."""

    path: str
    description: str
    choices: tuple[str, ...]
    section: bool  # holds keys or a list of sections, not a value
    items: bool = False  # a list of sections


def keys_of(task: str) -> list[Key]:
    """All keys of a task in the order of the schema; those of several kinds of one list item once each."""
    found: dict[str, Key] = {}
    for key in model_keys(TASKS[task], ""):
        first = found.get(key.path)
        if first and first.choices != key.choices:
            both = (*first.choices, *(choice for choice in key.choices if choice not in first.choices))
            key = Key(key.path, first.description or key.description, both, key.section, key.items)
        found[key.path] = key
    return list(found.values())


def model_keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        path = prefix + name
        branches = list(branches_of(field.annotation))
        models, items = sections_in(branches)
        nested = bool(models or items)
        choices = () if nested else tuple(choice for branch in branches for choice in choices_in(branch))
        yield Key(path, field.description or "", choices, nested, bool(items))
        for inner in models:
            yield from model_keys(inner, f"{path}.")
        for inner in items:
            yield from model_keys(inner, f"{path}.0.")


def branches_of(annotation: Any) -> Iterator[Any]:
    """The members of a union, optionals and annotations unwrapped."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from branches_of(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from branches_of(member)
    else:
        yield annotation


def sections_in(branches: list[Any]) -> tuple[list[type[BaseModel]], list[type[BaseModel]]]:
    """The sections a value may be, and those that the items of a list may be."""
    models = [branch for branch in branches if isinstance(branch, type) and issubclass(branch, BaseModel)]
    lists = [branch for branch in branches if get_origin(branch) is list]
    inside = [member for branch in lists for member in branches_of(get_args(branch)[0])]
    return models, [member for member in inside if isinstance(member, type) and issubclass(member, BaseModel)]


def choices_in(branch: Any) -> tuple[str, ...]:
    if get_origin(branch) is Literal:
        return tuple(str(choice) for choice in get_args(branch))
    if branch is bool:
        return ("true", "false")
    return ("null",) if branch is type(None) else ()


def names_at(task: str, path: "Path") -> list[str]:
    """The keys of the section at `path`; [] where there is no such section."""
    prefix = "".join("0." if isinstance(part, int) else f"{part}." for part in path)
    paths = (key.path for key in keys_of(task))
    return [rest for known in paths if known.startswith(prefix) and "." not in (rest := known[len(prefix) :])]
