"""The dotted keys of the schemas, their JSON Schema, and which of them a resume may change."""

import pytest

from rlhfctl.errors import UsageError
from rlhfctl.recipe import changes, paths
from rlhfctl.recipe.keys import keys_of, names_at
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.schema import json_schema
from rlhfctl.recipe.tasks import TASKS


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


def test_tables_of_keys_name_keys_that_exist() -> None:
    known = {key.path.replace(".0", ".*") for task in TASKS for key in keys_of(task)}
    assert [path for path in paths.PATHS if path not in known] == []
    assert [key for key in changes.MAY_CHANGE if key not in known] == []


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


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("quickstart/oreo", ["reward.shaping.clip=[0, 0.5]"], "reward.shaping.clip is ignored here"),
        ("quickstart/oreo", ["reward.granularity=token"], "reward.granularity is ignored in an evaluation"),
        (
            "quickstart/sft",
            ["reward.shaping.length_penalty=1"],
            "reward.shaping.length_penalty is ignored here",
        ),
        ("quickstart/sft", ["data.eval.0.weight=2"], r"override data\.eval\.0\.weight=2: .* is ignored here"),
        ("quickstart/ppo", ["data.train.0.step_separator=;"], "data.train.0.step_separator is ignored here"),
        ("quickstart/ppo", ["data.train_on=last_assistant"], "data.train_on is ignored here"),
        ("quickstart/ppo", ["reward.shaping.clip=[1, -1]"], r"clip is \[low, high\] with low < high"),
        ("quickstart/ppo", ["reward.shaping.overlong_buffer=500"], r"overlong_buffer \(500\) is longer than"),
    ],
)
def test_keys_that_mean_nothing_in_their_recipe_are_told(name: str, changes: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe(name, changes)
