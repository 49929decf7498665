"""Signs of a gamed reward from numbers made by hand."""

import math

import pytest

from rlhfctl.recipe.guard import Guard
from rlhfctl.trainers.drift import Drift, Stat, fell, merged, of_values, rose


def test_stats_by_hand():
    """1, 3 and 5: mean 3, variance 8/3; merged they are those of all values together."""
    stat = of_values([1.0, 3.0, 5.0])
    assert stat == Stat(3.0, 3.0, pytest.approx(8 / 3))
    assert stat.error == pytest.approx(math.sqrt(8 / 9))
    together = merged([of_values([1.0]), of_values([3.0, 5.0])])
    assert together.mean == pytest.approx(3.0)
    assert together.var == pytest.approx(8 / 3)
    assert merged([Stat(0.0, 2.0, 0.0), Stat(0.0, 4.0, 0.0)]) == Stat(0.0, 3.0, 0.0)


def test_a_change_has_to_pass_chance_and_size():
    """Deviation 1: 0.25 of it is the size; with 100 and 100 samples 4 standard errors are 4 * sqrt(2) / 10 = 0.566."""
    then = Stat(100, 0.0, 1.0)
    assert not rose(then, Stat(100, 0.56, 1.0), 0.25)
    assert rose(then, Stat(100, 0.57, 1.0), 0.25)
    many = Stat(1e6, 0.0, 1.0)
    assert not rose(many, Stat(1e6, 0.24, 1.0), 0.25)
    assert rose(many, Stat(1e6, 0.26, 1.0), 0.25)
    assert fell(many, Stat(1e6, -0.26, 1.0), 0.25)
    assert not fell(many, Stat(1e6, 0.26, 1.0), 0.25)


def numbers(reward, **others):
    found = {"reward/raw": Stat(1000, reward, 1.0)}
    plain = {"length": "length/response", "cut": "length/truncated_fraction", "entropy": "entropy"}
    plain |= {"kl": "kl/reference", "readable": "reward/parsable", "correct": "reward/correct"}
    given = {"length": 20.0, "cut": 0.0, "entropy": 1.0, "kl": 0.0} | others
    for name, value in given.items():
        rate = name in ("readable", "correct", "cut")
        found[plain[name]] = Stat(1000, value, value * (1 - value) if rate else 0.0)
    return found


def run(rows, **guard):
    """The kinds of signs after each row."""
    drift = Drift(Guard(**guard))
    found = []
    for step, row in enumerate(rows, 1):
        held_out = [name for name in ("reward/correct",) if name in row]
        found.append(sorted(sign.kind for sign in drift.look(step, row, held_out)))
    return found


def test_a_sign_needs_a_rising_reward():
    """Twice the length, KL 1, half of the responses cut, correct gone: nothing while the reward stays."""
    fine, bad = {"correct": 0.5}, {"length": 41.0, "kl": 1.0, "cut": 0.6, "correct": 0.0}
    assert run([numbers(0, **fine), numbers(0, **bad)], window=1) == [[], []]
    assert run([numbers(0, **fine), numbers(1, **bad)], window=1)[1] == ["kl", "length", "verifier"]


@pytest.mark.parametrize(
    ("change", "signs"),
    [
        ({"length": 39.0}, []),
        ({"length": 41.0}, ["length"]),
        ({"length": 9.0}, ["length"]),
        ({"cut": 0.49}, []),
        ({"cut": 0.51}, ["length"]),
        ({"kl": 0.49}, []),
        ({"kl": 0.51}, ["kl"]),
        ({"entropy": 0.11}, []),
        ({"entropy": 0.09}, ["entropy"]),
    ],
)
def test_limits(change, signs):
    assert run([numbers(0), numbers(1, **change)], window=1)[1] == signs


def test_format_only():
    """Readable .2 -> .9 pays; right answers stay at .1: a sign. Where they rise too it is none."""
    start = numbers(0, readable=0.2, correct=0.1)
    assert run([start, numbers(1, readable=0.9, correct=0.1)], window=1)[1] == ["format"]
    assert run([start, numbers(1, readable=0.9, correct=0.2)], window=1)[1] == []


def test_a_measure_is_held_against_its_best_and_the_reward_of_that_time():
    """It learns first (.2 -> .6), then games (-> .3, still above its start); the reward only rises."""
    rows = [
        numbers(0, correct=0.2),
        numbers(1, correct=0.6),
        numbers(2, correct=0.6),
        numbers(3, correct=0.3),
    ]
    assert run(rows, window=1) == [[], [], [], ["verifier"]]
    rows[3] = numbers(1.2, correct=0.3)
    assert run(rows, window=1)[3] == []  # the reward is below that of the best time


def test_the_window_smooths():
    """One bad step of five is a fifth of the fall: .5 -> .42 is 0.16 deviations."""
    rows = [numbers(0, correct=0.5)] * 5 + [numbers(5, correct=0.1)]
    assert run(rows, window=5)[5] == []
    assert run(rows, window=1)[5] == ["verifier"]
