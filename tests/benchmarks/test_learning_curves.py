"""The table of the learning curves by hand, and every method as a recipe that loads."""

import json

import pytest

from benchmarks.learning.curves import Curve, from_json, read_curve, table, to_json
from benchmarks.learning.methods import METHODS
from rlhfctl.recipe.load import load_recipe

CURVES = [
    Curve("ppo", 0, [0, 10, 20], [0.2, 0.5, 0.9], 10.0, 100),
    Curve("ppo", 1, [0, 10, 20], [0.4, 0.8, 0.8], 30.0, 100),
    Curve("grpo", 0, [0, 10, 20], [0.2, 0.3, 0.4], 7.0, 100),
]


def test_a_curve_from_a_runs_metrics(tmp_path):
    records = [
        {"step": 0, "eval/accuracy": 0.25, "seconds/cpu": 9.0},
        {"step": 1, "seconds/cpu": 1.0, "tokens": 5},
        {"step": 2, "seconds/cpu": 8.0, "eval/accuracy": 0.5, "tokens": 11},
        {"step": 3, "seconds/cpu": 2.0, "tokens": 17},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # Steps without an evaluation cost 1 and 2 s: 1.5 s times 3 steps.
    assert read_curve(tmp_path, "ppo", 4) == Curve("ppo", 4, [0, 2], [0.25, 0.5], 4.5, 17)
    assert from_json(to_json(CURVES)) == CURVES


def test_the_table_by_hand():
    rows = table(CURVES, [0, 20], 0.8).splitlines()
    assert rows[2] == (
        "| ppo | 2 | 0.300 (0.200 .. 0.400) | 0.850 (0.800 .. 0.900) | 15 (10 .. 20) | 20 (10 .. 30) |"
    )
    assert rows[3].endswith("| 0 of 1 seeds | 7 (7 .. 7) |")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_recipe(method):
    recipe = load_recipe("quickstart/ppo", METHODS[method]).recipe
    assert recipe.algorithm.advantage == {"ppo": "gae"}.get(method, method)
