"""Estimators against numbers worked out by hand."""

import math
from pathlib import Path

import pytest

from rlhfctl.evaluation import compare
from rlhfctl.evaluation.estimates import (
    auc,
    bootstrap,
    calibration_error,
    majority,
    mean,
    mean_share,
    paired_difference,
    pass_at_k,
    proportion,
    ratio,
)
from rlhfctl.evaluation.results import write_lines


def test_wilson_interval() -> None:
    eight = proportion([True] * 8 + [False] * 2)
    # (.8 + 3.8415/20) / 1.38415 -+ 1.95996 sqrt(.016 + .0096036) / 1.38415
    assert eight is not None
    assert (eight.value, eight.n, eight.interval) == (0.8, 10, "wilson")
    assert (eight.low, eight.high) == (pytest.approx(0.490162, abs=2e-6), pytest.approx(0.943318, abs=2e-6))
    none = proportion([False] * 20)
    assert none is not None
    assert (none.low, none.high) == (0.0, pytest.approx(3.841459 / 23.841459))
    all_ = proportion([True] * 20)
    assert all_ is not None
    assert (all_.low, all_.high) == (pytest.approx(20 / 23.841459), 1.0)
    assert proportion([]) is None


def test_mean_with_its_standard_error() -> None:
    found = mean([1.0, 2.0, 3.0, 6.0])
    assert found is not None
    # variance (4 + 1 + 0 + 9) / 3, error sqrt(14 / 3 / 4)
    assert found.value == 3.0
    assert found.standard_error == pytest.approx(math.sqrt(14 / 12))
    assert found.high == pytest.approx(3 + 1.959964 * math.sqrt(14 / 12))
    one = mean([5.0])
    assert one is not None
    assert (one.value, one.standard_error, one.high) == (5.0, None, math.inf)
    shares = mean_share([0.0, 0.0, 0.0, 0.5])
    assert shares is not None
    assert (shares.value, shares.low) == (0.125, 0.0)


@pytest.mark.parametrize(
    ("n", "right", "k", "chance"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (5, 2, 3, 9 / 10),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (5, 3, 3, 1.0),  # three of the two wrong ones cannot be drawn
        (8, 0, 4, 0.0),
    ],
)
def test_pass_at_k(n: int, right: int, k: int, chance: float) -> None:
    assert pass_at_k(n, right, k) == pytest.approx(chance, abs=1e-12)


def test_pass_at_k_is_refused_where_it_is_not_defined() -> None:
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(4, 2, 5)


def test_majority_and_its_ties() -> None:
    assert majority(["3", "5", "5"]) == "5"
    assert majority(["3", "5", "5", "3"]) == "3"  # the one that came first
    assert majority([None, None, "7"]) == "7"  # no answer has no vote
    assert majority([None]) is None


def test_auc() -> None:
    # right: 3, 1; wrong: 2, 1. Pairs: 3>2, 3>1, 1<2, 1=1 -> (1 + 1 + 0 + .5) / 4
    assert auc([3.0, 1.0, 2.0, 1.0], [True, True, False, False]) == 0.625
    assert auc([0.1, 0.9], [False, True]) == 1.0
    assert auc([0.1, 0.9], [True, True]) is None


def test_calibration_error() -> None:
    # bin 0.9..1: mean .95, share 1/2, weight 2/4; bin 0.1..0.2: .15, share 0, 1/4; bin 0.5: .5, share 1, 1/4
    found = calibration_error([0.9, 1.0, 0.15, 0.5], [True, False, False, True])
    assert found == pytest.approx(0.45 * 2 / 4 + 0.15 / 4 + 0.5 / 4)
    assert calibration_error([], []) is None


def test_ratio_and_its_error() -> None:
    found = ratio([4.0, 2.0], [1.0, 0.0])
    # R = 6, residuals -2 and 2, error sqrt(8 / 1 / 2) / (1/2)
    assert found is not None
    assert (found.value, found.standard_error) == (6.0, pytest.approx(4.0))
    assert ratio([4.0], [0.0]) is None


def test_pairs_are_compared_one_by_one() -> None:
    found = paired_difference([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0])
    # differences 1, 0, 0, 1: mean .5, variance 1/3, error sqrt(1/12)
    assert found is not None
    assert (found.value, found.standard_error) == (0.5, pytest.approx(math.sqrt(1 / 12)))


def test_the_other_evaluation_is_read_line_by_line(tmp_path: Path) -> None:
    """A line separator inside an answer ends no line."""
    rows = [{"id": str(row), "accuracy": 1.0, "path_accuracy": None, "method": "greedy"} for row in range(2)]
    write_lines(tmp_path / "results.jsonl", [{**row, "text": "a\u2028b\u0085"} for row in rows])
    found = compare.read(tmp_path)
    assert found["1"] == {"accuracy": 1.0, "path_accuracy": None, "method": "greedy", "turns": None}
    assert len(found) == 2


def test_bootstrap_holds_the_estimate_and_repeats_itself() -> None:
    items = [float(k % 7) for k in range(50)]

    def average(of: list[float]) -> float:
        return sum(of) / len(of)

    found = bootstrap(items, average, 3)
    normal = mean(items)
    assert found is not None
    assert normal is not None
    assert found == bootstrap(items, average, 3)
    assert found.low < found.value < found.high
    # Percentiles of 200 resamples: near the normal interval.
    assert found.low == pytest.approx(normal.low, abs=0.15)
    assert found.high == pytest.approx(normal.high, abs=0.15)
