"""JSON Schema of a task's recipes, as editors and other tools read it.

A recipe that extends another holds only what it changes, so with `extends` no key is required, and in a section that is
merged with the other's none ever is; the items of lists, which are replaced whole, keep what they need. Missing keys
that this lets pass are told by the command.
"""

from collections.abc import Iterator
from typing import Any

from rlhfctl.errors import UsageError
from rlhfctl.recipe.tasks import TASKS


def json_schema(task: str) -> dict[str, Any]:
    """Raises UsageError for a task that does not exist."""
    if task not in TASKS:
        raise UsageError(f"there is no task {task}: it is one of {', '.join(TASKS)}")
    schema = TASKS[task].model_json_schema()
    schema["properties"] = {
        "extends": {"type": "string", "description": "a shipped name or a path: the recipe this one changes"},
        **schema["properties"],
    }
    whole = schema.pop("required")
    items = set(items_of(schema))
    for name, section in schema["$defs"].items():
        if name not in items:
            section.pop("required", None)
    schema |= {"required": ["task"], "if": {"not": {"required": ["extends"]}}, "then": {"required": whole}}
    described = {"title": f"rlhfctl {task} recipe", "description": f"what `rlhfctl {task}` reads"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **described}


def items_of(value: Any, inside: bool = False) -> Iterator[str]:
    """Names of the definitions that stand in lists."""
    if isinstance(value, dict):
        if inside and "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        for key, part in value.items():
            yield from items_of(part, inside or key == "items")
    elif isinstance(value, list):
        for part in value:
            yield from items_of(part, inside)
