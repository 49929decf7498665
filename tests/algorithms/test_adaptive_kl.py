"""Hand numbers for the KL coefficient. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest

from rlhfctl.algorithms import adaptive_kl


@pytest.fixture(name="m")
def module() -> ModuleType:
    return adaptive_kl


def test_hand_numbers(m: ModuleType) -> None:
    # target .1, 128 samples of a horizon of 1280: a tenth of the error
    assert m.adapted_coef(0.5, 0.1, 0.1, 1280, 128) == 0.5
    assert m.adapted_coef(0.5, 0.11, 0.1, 1280, 128) == pytest.approx(0.5 * 1.01, abs=1e-12)
    assert m.adapted_coef(0.5, 0.085, 0.1, 1280, 128) == pytest.approx(0.5 * 0.985, abs=1e-12)


def test_the_error_is_clipped_on_both_sides(m: ModuleType) -> None:
    assert m.adapted_coef(0.5, 9.0, 0.1, 1280, 128) == pytest.approx(0.5 * 1.02, abs=1e-12)
    assert m.adapted_coef(0.5, -3.0, 0.1, 1280, 128) == pytest.approx(0.5 * 0.98, abs=1e-12)


def test_a_short_horizon_does_not_turn_the_penalty_round(m: ModuleType) -> None:
    assert m.adapted_coef(0.5, 0.0, 0.1, 10, 128) == 0.0  # 1 - .2 * 12.8 < 0
    assert m.adapted_coef(0.0, 9.0, 0.1, 10, 128) == 0.0


def test_a_kl_that_is_no_number_is_refused(m: ModuleType) -> None:
    for kl in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="KL to the reference is"):
            m.adapted_coef(0.5, kl, 0.1, 1280, 128)


def test_it_settles_where_the_kl_answers_the_coefficient(m: ModuleType) -> None:
    # KL = .02 / coef: the coefficient that gives .1 is .2
    coef = 1.0
    for _ in range(400):
        coef = m.adapted_coef(coef, 0.02 / coef, 0.1, 1280, 128)
    assert coef == pytest.approx(0.2, rel=1e-3)
