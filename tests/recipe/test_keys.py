"""The dotted keys of the schemas, their JSON Schema, and which of them a resume may change."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.errors import UsageError
from rlhfctl.recipe import changes, not_built, paths
from rlhfctl.recipe.catalogue import shipped_names
from rlhfctl.recipe.keys import keys_of, names_at
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.schema import json_schema
from rlhfctl.recipe.tasks import TASKS
from rlhfctl.recipe.yaml12 import parse


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_described(task: str) -> None:
    assert [key.path for key in keys_of(task) if not key.description and not key.section] == []


def test_choices_of_every_kind_of_key() -> None:
    keys = {key.path: key for key in keys_of("ppo")}
    assert keys["algorithm.advantage"].choices[:2] == ("gae", "grpo")
    assert keys["data.shuffle"].choices == ("true", "false")
    assert keys["reward.sources.0.kind"].choices == ("verifier", "python", "model", "remote")
    assert keys["algorithm.whiten_advantages"].choices == ("true", "false", "null")
    assert keys["launch.threads"].choices == ("auto",)
    assert keys["policy.lora"].section
    assert keys["data.train"].items
    assert not keys["policy.lora"].items
    assert "policy.lora.rank" in keys
    assert names_at("ppo", ("reward", "sources", 3))[:3] == ["weight", "span_weight", "kind"]
    assert names_at("sft", ("algorithm",)) == []


def test_tables_of_keys_name_keys_that_exist_or_do_not() -> None:
    known = {key.path.replace(".0", ".*") for task in TASKS for key in keys_of(task)}
    assert [path for path in paths.PATHS if path not in known] == []
    assert [key for key in changes.MAY_CHANGE if key not in known] == []
    assert [key for key in not_built.KEYS if key in known] == []
    choices = {key.path.replace(".0", ".*"): key.choices for task in TASKS for key in keys_of(task)}
    for path, values in not_built.VALUES.items():
        assert path in choices
        assert not set(values) & set(choices[path])


@pytest.mark.parametrize("task", TASKS)
def test_the_json_schema_is_of_the_task(task: str) -> None:
    schema = json_schema(task)
    assert schema["properties"]["task"]["const"] == task
    assert schema["additionalProperties"] is False
    assert schema["properties"]["extends"]["type"] == "string"
    assert {"task", "name", "policy", "data", "train"} <= set(schema["then"]["required"])
    assert schema["$defs"]["Optim"]["properties"]["lr"]["exclusiveMinimum"] == 0


def test_schemas_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="there is no task x"):
        json_schema("x")


def test_changes_between_two_recipes() -> None:
    before = load_recipe("quickstart/sft").recipe
    after = load_recipe(
        "quickstart/sft",
        [
            "train.steps=900",
            "optim.lr=1e-3",
            "data.eval.0.path=x",
            "launch.threads=2",
        ],
    ).recipe
    differ = changes.changes(before, after)
    assert differ["train.steps"] == "700 -> 900"
    assert differ["optim.lr"] == "0.003 -> 0.001"
    assert differ["launch.threads"] == '"auto" -> 2'
    assert set(differ) == {"train.steps", "optim.lr", "launch.threads", "data.eval.0.path"}
    assert {key for key in differ if changes.may_change(key)} == {"train.steps", "launch.threads"}
    assert changes.changes(before, before) == {}


def test_a_service_may_move_but_not_become_another_source() -> None:
    before = load_recipe("quickstart/served-rm").recipe
    moved = load_recipe("quickstart/served-rm", ["reward.sources.0.url=http://127.0.0.1:6000"]).recipe
    other = load_recipe("quickstart/served-rm", ["reward.sources.0.weight=1.0"]).recipe
    assert [changes.may_change(key) for key in changes.changes(before, moved)] == [True]
    assert [changes.may_change(key) for key in changes.changes(before, other)] == [False]


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
