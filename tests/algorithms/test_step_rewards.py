"""Step rewards by hand. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import step_rewards

# P = .8, .5, .9: logits log(P / (1 - P))
LOGITS = torch.tensor([math.log(4), 0.0, math.log(9)], dtype=torch.float64)


@pytest.fixture(name="m")
def module() -> ModuleType:
    return step_rewards


def check(m: ModuleType, form: str, expected: list[float]) -> None:
    assert_close(
        m.step_rewards(LOGITS, form), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_hand_numbers(m: ModuleType) -> None:
    check(m, "raw", [0.8, 0.5, 0.9])
    check(m, "difference", [0.8, -0.3, 0.4])
    check(m, "min", [0.8, -0.3, 0.0])


def test_what_each_form_sums_to(m: ModuleType) -> None:
    # difference: the last probability; min: the lowest; raw grows with every step.
    assert float(m.step_rewards(LOGITS, "difference").sum()) == pytest.approx(0.9)
    assert float(m.step_rewards(LOGITS, "min").sum()) == pytest.approx(0.5)
    assert float(m.step_rewards(LOGITS, "raw").sum()) == pytest.approx(2.2)


def test_no_steps(m: ModuleType) -> None:
    for form in m.STEP_REWARDS:
        assert m.step_rewards(torch.zeros(0), form).tolist() == []


def test_an_unknown_form(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="form is 'x': one of difference, raw, min"):
        m.step_rewards(LOGITS, "x")
