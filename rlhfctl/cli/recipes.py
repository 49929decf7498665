"""recipes list | show NAME | schema TASK: the shipped recipes, and what a recipe may hold."""

import re
import sys
from difflib import get_close_matches
from typing import Annotated

import typer

from rlhfctl.cli.console import Console, hanging, terminal_width
from rlhfctl.cli.exit_codes import DONE
from rlhfctl.cli.options import JsonOption, QuietOption, VerboseOption
from rlhfctl.errors import UsageError


def recipes(
    ctx: typer.Context,
    action: Annotated[str, typer.Argument(metavar="list|show|schema", hidden=True)] = "list",
    name: Annotated[str | None, typer.Argument(metavar="NAME", hidden=True)] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> int:
    """The shipped recipes, and what a recipe may hold.

    \b
    list         names and what they do (default)
    show NAME    the recipe as it is, to copy and change
    schema TASK  JSON Schema, for editors

    \b
    Examples:
      rlhfctl recipes
      rlhfctl recipes show quickstart/ppo > my.yaml
      rlhfctl recipes schema ppo > ppo.schema.json
    """
    if action not in ACTIONS:
        near = get_close_matches(action, ACTIONS, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"recipes knows list, show NAME and schema TASK, not {action}{meant}")
    return ACTIONS[action](ctx.obj, name)


def list_recipes(console: Console, name: str | None) -> int:
    from rlhfctl.recipe.catalogue import shipped_names, shipped_path, summary

    if name is not None:
        raise UsageError(f"recipes list takes no name: `rlhfctl recipes show {name}`")
    rows = []
    for each in shipped_names():
        path = shipped_path(each)
        assert path is not None
        task = re.search(r"^task: *(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        rows.append(
            {"name": each, "task": task[1] if task else None, "summary": summary(path), "path": str(path)}
        )
    width = max((len(str(row["name"])) for row in rows), default=0)
    summaries = [(f"{row['name']:{width}}  ", str(row["summary"])) for row in rows]
    lines = hanging(summaries, terminal_width(sys.stdout))
    return console.finish(DONE, "\n".join(lines), fields={"recipes": rows})


def show_recipe(console: Console, name: str | None) -> int:
    from rlhfctl.recipe.catalogue import shipped_names, shipped_path, to_copy

    if name is None:
        raise UsageError("which one? `rlhfctl recipes show NAME`; `rlhfctl recipes` lists them")
    path = shipped_path(name)
    if path is None:
        near = get_close_matches(name, shipped_names(), 1, 0.5)
        meant = f"; did you mean {near[0]}?" if near else " (rlhfctl recipes)"
        raise UsageError(f"there is no shipped recipe {name}{meant}")
    text = to_copy(path)
    return console.finish(DONE, text, fields={"name": name, "path": str(path), "text": text})


def show_schema(console: Console, name: str | None) -> int:
    import json

    from rlhfctl.recipe.schema import json_schema

    if name is None:
        raise UsageError("of which task? `rlhfctl recipes schema ppo`")
    schema = json_schema(name)
    return console.finish(DONE, json.dumps(schema, indent=2), fields={"task": name, "json_schema": schema})


ACTIONS = {"list": list_recipes, "show": show_recipe, "schema": show_schema}
