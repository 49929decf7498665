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


# Two responses of 2 and 3 tokens. trainer / sampler: 2, .5 | 4, .25, 1: the geometric mean of both is 1.
SAMPLER = (-1.0, -2.0, -3.0, -1.0, -0.5)
RATIOS = (2.0, 0.5, 4.0, 0.25, 1.0)


def test_banded_weights_by_hand(m: ModuleType) -> None:
    """Inside [.5, 2] the ratio itself, on the bounds too; outside nothing."""
    sampler = doubles(*SAMPLER)
    weights, metrics = m.banded_weights(sampler + doubles(*RATIOS).log(), sampler, 0.5 - 1e-9, 2.0 + 1e-9)
    assert_close(weights, doubles(2, 0.5, 0, 0, 1), rtol=0, atol=1e-14)
    assert (metrics["tokens"], metrics["masked"]) == (5, 2)
    assert_close(metrics["weight"], torch.tensor(3.5, dtype=torch.float64), rtol=0, atol=1e-14)
    exact, _ = m.banded_weights(doubles(0, 0), doubles(0, 0), 1.0, 1.0)
    assert exact.tolist() == [1.0, 1.0]
    far, _ = m.banded_weights(doubles(0), doubles(-2000), 0.5, 2.0)
    assert far.tolist() == [0.0]
    trainer = sampler.clone().requires_grad_()
    assert not m.banded_weights(trainer, sampler, 0.5, 2.0)[0].requires_grad


def test_sequence_mask_by_hand(m: ModuleType) -> None:
    """Means of log 2 + log 3 over two tokens and of log 8 over three: sqrt 6 = 2.449 and 2."""
    sampler = doubles(-1, -2, -3, -1, -5)
    trainer = sampler + doubles(2, 3, 8, 1, 1).log()
    lengths = torch.tensor([2, 3])
    assert m.sequence_mask(trainer, sampler, lengths, 1.9, 2.5).tolist() == [True] * 5
    assert m.sequence_mask(trainer, sampler, lengths, 1.9, 2.4).tolist() == [False, False, True, True, True]
    assert m.sequence_mask(trainer, sampler, lengths, 2.1, 2.5).tolist() == [True, True, False, False, False]
    assert m.sequence_mask(doubles(0), doubles(0), torch.tensor([1]), 1.0, 1.0).tolist() == [True]
    kept = m.sequence_mask(trainer, sampler, torch.tensor([0, 2, 0, 3]), 2.1, 2.5)
    assert kept.tolist() == [True, True, False, False, False]
