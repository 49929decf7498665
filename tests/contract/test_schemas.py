"""The JSON Schemas beside the recipes, and what an editor makes of the recipes with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.recipe.catalogue import shipped_names
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.schema import json_schema
from rlhfctl.recipe.tasks import TASKS
from rlhfctl.recipe.yaml12 import parse


def test_the_schemas_beside_the_recipes_are_those_of_the_code(repo: Path) -> None:
    for task in TASKS:
        written = json.loads((repo / f"recipes/schema/{task}.json").read_text())
        assert written == json_schema(task), "keys have changed: `make schema` writes recipes/schema"


def test_every_recipe_names_its_schema_for_editors(repo: Path) -> None:
    for name in shipped_names():
        path = repo / f"recipes/{name}.yaml"
        first = path.read_text().splitlines()[0]
        wanted = f"# yaml-language-server: $schema=../schema/{load_recipe(name).recipe.task}.json"
        assert first == wanted, f"the first line of recipes/{name}.yaml should be {wanted}"


@pytest.mark.heavy
def test_what_an_editor_says_of_the_recipes(repo: Path) -> None:
    """Of the shipped ones nothing, of mistakes in them something; jsonschema comes with the full installation."""
    from jsonschema import Draft202012Validator

    def errors(task: str, recipe: Any) -> list[str]:
        return [error.message for error in Draft202012Validator(json_schema(task)).iter_errors(recipe)]

    for name in shipped_names():
        recipe = parse((repo / f"recipes/{name}.yaml").read_text(), name).value
        task = recipe["task"]
        assert errors(task, recipe) == [], name
        assert errors(task, {**recipe, "polcy": {}}) != []
        assert errors(task, {**recipe, "optim": {"lr": -1}}) != []
        resolved = load_recipe(name).recipe.model_dump(mode="json")
        assert errors(task, resolved) == [], name
        assert errors(task, {key: value for key, value in resolved.items() if key != "data"}) != []
