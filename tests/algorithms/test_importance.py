"""Hand numbers for the importance weights. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import importance


@pytest.fixture(name="m")
def module() -> ModuleType:
    return importance


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_numbers(m: ModuleType) -> None:
    # trainer / sampler = 3, 2, 1, 1/4; cap 2: the first is capped, the second stands on the cap, none is raised
    sampler = doubles(-1, -2, -3, -1)
    trainer = sampler + doubles(3, 2, 1, 0.25).log()
    weights, metrics = m.truncated_weights(trainer, sampler, 2.0000001)
    assert_close(weights, doubles(2.0000001, 2, 1, 0.25), rtol=0, atol=1e-14)
    assert metrics["tokens"] == 4
    assert metrics["capped"] == 1
    assert_close(metrics["weight"], torch.tensor(5.2500001, dtype=torch.float64), rtol=0, atol=1e-14)


def test_the_mask_and_what_stands_outside(m: ModuleType) -> None:
    nan = math.nan
    weights, metrics = m.truncated_weights(
        doubles(-1, nan, 50), doubles(-1, -1, 0), 2.0, torch.tensor([1, 0, 0])
    )
    assert weights.tolist() == [1.0, 0.0, 0.0]
    assert metrics == {"tokens": 1, "capped": 0, "weight": 1.0}
    # A cap below 1 counts masked tokens only.
    _, metrics = m.truncated_weights(doubles(0, 0), doubles(0, 0), 0.5, torch.tensor([1, 0]))
    assert metrics == {"tokens": 1, "capped": 1, "weight": 0.5}


def test_weights_are_detached(m: ModuleType) -> None:
    trainer, sampler = doubles(-1).requires_grad_(), doubles(-1).requires_grad_()
    weights, metrics = m.truncated_weights(trainer, sampler, 2.0)
    assert not weights.requires_grad
    assert not metrics["weight"].requires_grad


def test_overflow_is_capped(m: ModuleType) -> None:
    weights, metrics = m.truncated_weights(torch.tensor([0.0]), torch.tensor([-200.0]), 2.0)
    assert weights.tolist() == [2.0]
    assert metrics["capped"] == 1
