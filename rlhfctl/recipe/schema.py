"""JSON Schema of a task's recipes, as editors and other tools read it."""

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
    described = {"title": f"rlhfctl {task} recipe", "description": f"what `rlhfctl {task}` reads"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **described}
