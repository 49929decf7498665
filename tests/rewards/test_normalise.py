"""Normalised rewards by hand."""

import json
import random
import statistics
from dataclasses import asdict

import pytest

from rlhfctl.rewards.normalise import Running, normalise


def test_group() -> None:
    """1, 3 of one prompt; 5, 5, failed of another; 7 alone: -1, 1; 0, 0, none; 0."""
    values = [1.0, 3.0, 5.0, 5.0, None, 7.0]
    found = normalise(values, [0, 0, 1, 1, 1, 2], "group", Running())
    assert found == [pytest.approx(-1.0), pytest.approx(1.0), 0.0, 0.0, None, 0.0]


def test_batch() -> None:
    """2, 4, 4, 6: mean 4, variance 2."""
    found = normalise([2.0, 4.0, None, 4.0, 6.0], [0] * 5, "batch", Running())
    assert found == [pytest.approx(-(2**0.5)), 0.0, None, 0.0, pytest.approx(2**0.5)]
    assert normalise([0.1] * 3, [0] * 3, "batch", Running()) == [0.0] * 3


def test_running_by_hand() -> None:
    """1, 3: mean 2, deviation 1. Then 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5."""
    running = Running()
    assert normalise([1.0, 3.0], [0, 0], "running", running) == [pytest.approx(-1.0), pytest.approx(1.0)]
    found = normalise([5.0, None, 7.0], [0, 0, 0], "running", running)
    assert found == [pytest.approx(1 / 5**0.5), None, pytest.approx(3 / 5**0.5)]
    assert (running.count, running.mean, running.std) == (4, pytest.approx(4.0), pytest.approx(5**0.5))
    assert normalise([], [], "running", running) == []


def test_running_is_the_deviation_of_all_values_and_survives_a_checkpoint() -> None:
    rng = random.Random(1)
    batches = [[rng.gauss(1e3, 2.0) for _ in range(rng.randrange(1, 9))] for _ in range(50)]
    whole, parts = Running(), Running()
    for batch in batches:
        whole.add(batch)
        parts.add(batch)
        parts = Running(**json.loads(json.dumps(asdict(parts))))
    every = [value for batch in batches for value in batch]
    assert whole.mean == pytest.approx(statistics.fmean(every))
    assert whole.std == pytest.approx(statistics.pstdev(every))
    assert parts == whole


def test_equal_values_are_zero_until_they_differ() -> None:
    running = Running()
    assert normalise([0.3, 0.3], [0, 0], "running", running) == [0.0, 0.0]
