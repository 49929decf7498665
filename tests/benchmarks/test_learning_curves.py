"""The table of the learning curves by hand, and every method as a recipe that loads."""

import json

import pytest

from benchmarks.learning.__main__ import ALL, last_of_each
from benchmarks.learning.curves import Curve, from_json, marks, read_curve, table, to_json
from benchmarks.learning.methods import REWARD_MODELS
from rlhfctl.recipe.load import load_recipe

CURVES = [
    Curve("ppo", 0, [0, 10, 20], [0.2, 0.5, 0.9], 10.0, 100, 0.8, 0.1),
    Curve("ppo", 1, [0, 10, 20], [0.4, 0.8, 0.8], 30.0, 100, 0.6, 0.1),
    Curve("grpo", 0, [0, 10, 20], [0.2, 0.3, 0.4], 7.0, 100),
]


def test_a_curve_from_a_runs_metrics(tmp_path):
    records = [
        {"step": 0, "eval/accuracy": 0.25, "seconds/cpu": 9.0},
        {"step": 1, "seconds/cpu": 1.0, "tokens": 5},
        {"step": 2, "seconds/cpu": 8.0, "eval/accuracy": 0.5, "eval/path_accuracy": 0.4, "tokens": 11},
        {"step": 3, "seconds/cpu": 2.0, "tokens": 17, "kl/reference": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # Steps without an evaluation cost 1 and 2 s: 1.5 s times 3 steps.
    assert read_curve(tmp_path, "ppo", 4) == Curve("ppo", 4, [0, 2], [0.25, 0.5], 4.5, 17, 0.4, 0.1)
    assert from_json(to_json(CURVES)) == CURVES


def test_the_table_by_hand():
    rows = table(CURVES, [0, 20], 0.8).splitlines()
    assert rows[2] == (
        "| ppo | 2 | 0.300 (0.200 .. 0.400) | 0.850 (0.800 .. 0.900) | 0.700 (0.600 .. 0.800) | 0.100 (0.100 .. 0.100) "
        "| 15 (10 .. 20) | 20 (10 .. 30) |"
    )
    assert rows[3].endswith("| 0.400 (0.400 .. 0.400) |  |  | 0 of 1 seeds | 7 (7 .. 7) |")


def test_marks_are_steps_that_every_curve_has():
    short = Curve("rloo", 0, [0, 5, 20], [0.1, 0.1, 0.1], 1.0, 1)
    assert marks([*CURVES, short]) == [0, 20]
    assert marks([Curve("ppo", 0, list(range(0, 121, 10)), [0.0] * 13, 1.0, 1)]) == [0, 30, 60, 90, 120]


@pytest.mark.parametrize("name", ALL)
def test_every_method_is_a_recipe(name, tmp_path):
    method = ALL[name]
    changes = last_of_each(["policy.path={home}/sft/final", *method.changes], tmp_path)
    recipe = load_recipe(f"quickstart/{method.recipe}", changes).recipe
    if name in ("offline_st", "sft_long"):  # from random weights, as the sft run was
        assert recipe.policy.from_config == f"{tmp_path}/model"
        return
    advantage = {"grpo", "rloo", "reinforce_baseline", "prime"} & {name, name.partition("-")[0]}
    assert recipe.algorithm.advantage == (advantage.pop() if advantage else "gae")
    assert recipe.policy.path == f"{tmp_path}/sft/final"


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_every_reward_model_is_a_recipe(name, tmp_path):
    load_recipe("quickstart/rm", last_of_each(REWARD_MODELS[name], tmp_path))
