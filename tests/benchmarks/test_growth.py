"""The tables of cost growth: the fit by hand, and every key as a recipe that loads."""

from pathlib import Path

import pytest

from benchmarks.__main__ import WORKLOADS
from benchmarks.growth import KEYS, exponent, growth_table
from benchmarks.steps import BATCH, LENGTHS, of_length
from rlhfctl.recipe.load import load_recipe

# CPU seconds per token grow with the square root.
ROWS = [(f"x {x:g}", x, {"tokens_per_cpu_s": 100 / x**0.5, "peak_rss_mb": 7.0}) for x in (1.0, 4.0, 16.0)]


def test_the_fit_and_the_table() -> None:
    assert exponent(ROWS) == pytest.approx(0.5)
    lines = growth_table("x", ROWS).splitlines()
    assert lines[3] == "| x 4 | 20.000 | 50 | 7.0 |"
    assert lines[-1] == "Exponent: 0.50"


@pytest.mark.parametrize(("name", "override"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_every_key_is_one(name: str, override: str, tmp_path: Path) -> None:
    recipe, values = WORKLOADS[name]
    filled = {
        "model": "m",
        "here": "h",
        "data": "d",
        "name": name,
        "threads": 1,
        "dtype": "float32",
        **values,
    }
    filled["reward"] = str(values.get("reward", "")).format(**filled)
    (tmp_path / "r.yaml").write_text(recipe.format(**filled))
    plain = load_recipe(str(tmp_path / "r.yaml")).recipe
    assert load_recipe(str(tmp_path / "r.yaml"), [override]).recipe != plain


def test_steps_over_lengths_have_as_many_tokens() -> None:
    for length in LENGTHS:
        for rows in of_length(length, 2):
            assert sum(rows.lengths) == sum(map(len, rows.ids)) == BATCH
            assert sum(map(len, rows.trained)) == BATCH // 2
