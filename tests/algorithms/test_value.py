"""Hand numbers for the value loss. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhfctl.algorithms import value


@pytest.fixture(name="m")
def module() -> ModuleType:
    return value


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# clip .5; one token per case:
#   V    V_old  R    V'    (V-R)^2  (V'-R)^2  max    note                             d (max / 2) / d V
#   2.0  1.0    3.0  1.5   1.00     2.25      2.25   moved past the clip towards R    0
#   2.0  1.0    0.0  1.5   4.00     2.25      4.00   moved past the clip away from R  2.0 = V - R
#   1.2  1.0    2.0  1.2   0.64     0.64      0.64   inside                          -0.8
#   0.0  1.0    0.4  0.5   0.16     0.01      0.16   overshot R                      -0.4
#   0.0  1.0   -1.0  0.5   1.00     2.25      2.25   past the clip downwards, to R    0
VALUES, OLD, RETURNS = doubles(2, 2, 1.2, 0, 0), doubles(1, 1, 1, 1, 1), doubles(3, 0, 2, 0.4, -1)
WORST = doubles(2.25, 4.0, 0.64, 0.16, 2.25)
GRADIENTS = doubles(0, 2.0, -0.8, -0.4, 0)


def test_each_case_of_the_table(m: ModuleType) -> None:
    for case in range(5):
        weights = torch.zeros(5, dtype=torch.float64)
        weights[case] = 0.5
        values = VALUES.clone().requires_grad_()
        loss, metrics = m.value_loss(values, OLD, RETURNS, weights, 0.5)
        loss.backward()
        assert_close(loss.detach(), 0.25 * WORST[case], rtol=0, atol=1e-14)
        assert values.grad is not None
        expected = torch.zeros(5, dtype=torch.float64)
        expected[case] = 0.5 * GRADIENTS[case]
        assert_close(values.grad, expected, rtol=0, atol=1e-14)
        assert metrics["tokens"] == 1


def test_the_loss_is_the_weighted_sum_and_metrics_are_sums(m: ModuleType) -> None:
    # weights .1 .. .5: (.225 + .8 + .192 + .064 + 1.125) / 2 = 1.203; squared errors 1 + 4 + .64 + .16 + 1 = 6.8
    loss, metrics = m.value_loss(
        VALUES.clone().requires_grad_(), OLD, RETURNS, doubles(0.1, 0.2, 0.3, 0.4, 0.5), 0.5
    )
    assert_close(loss.detach(), torch.tensor(1.203, dtype=torch.float64), rtol=0, atol=1e-14)
    assert set(metrics) == {"tokens", "clipped", "squared_error"}
    assert metrics["tokens"] == 5
    assert metrics["clipped"] == 2
    assert_close(metrics["squared_error"], torch.tensor(6.8, dtype=torch.float64), rtol=0, atol=1e-14)
    assert not any(number.requires_grad for number in metrics.values())


def test_what_moved_less_than_the_clip_is_not_counted_as_clipped(m: ModuleType) -> None:
    """V_old + (V - V_old) is not V in float32: here it lies farther from R, by one bit."""
    values = torch.tensor([0.11626286804676056, 0.1236698105931282])
    old = torch.tensor([-0.010489828884601593, 0.021449517458677292])
    _, metrics = m.value_loss(values, old, torch.zeros(2), torch.ones(2), 0.2)
    assert metrics["clipped"] == 0


def test_without_a_clip_it_is_half_the_squared_error(m: ModuleType) -> None:
    # (1 + 4 + .64 + .16 + 1) / 2 / 4 = .85, gradient (V - R) / 4
    values = VALUES.clone().requires_grad_()
    loss, metrics = m.value_loss(values, OLD, RETURNS, torch.full((5,), 0.25, dtype=torch.float64), None)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(0.85, dtype=torch.float64), rtol=0, atol=1e-14)
    assert values.grad is not None
    assert_close(values.grad, doubles(-0.25, 0.5, -0.2, -0.1, 0.25), rtol=0, atol=1e-14)
    assert metrics["clipped"] == 0


def test_only_values_carry_a_gradient(m: ModuleType) -> None:
    values, old, returns = (doubles(number).requires_grad_() for number in (2.0, 1.0, 0.0))
    loss, _ = m.value_loss(values, old, returns, doubles(1), 0.5)
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2.0]
    assert old.grad is None
    assert returns.grad is None


def test_positions_of_weight_zero_take_no_part(m: ModuleType) -> None:
    for junk in (50.0, math.nan, math.inf):
        values = doubles(2, junk).requires_grad_()
        loss, metrics = m.value_loss(values, doubles(2, junk), doubles(1, junk), doubles(0.5, 0), 0.2)
        loss.backward()
        assert loss == 0.25
        assert values.grad is not None
        assert values.grad.tolist() == [0.5, 0.0]
        assert metrics == {"tokens": 1, "clipped": 0, "squared_error": 1.0}


def test_explained_variance(m: ModuleType) -> None:
    # R = 1, 2, 3, 6 (variance 3.5), V = 1, 1, 3, 3: errors 0, 1, 0, 3, mean 1, variance 10 / 4 - 1 = 1.5
    returns, values = doubles(1, 2, 3, 6, 9), doubles(1, 1, 3, 3, math.nan)
    sums = m.explained_variance_sums(values, returns, doubles(1, 1, 1, 1, 0))
    assert sums == {"count": 4, "returns": 12, "returns_squares": 50, "errors": 4, "errors_squares": 10}
    assert m.explained_variance(sums) == pytest.approx(1 - 1.5 / 3.5, abs=1e-14)


def test_explained_variance_at_its_edges(m: ModuleType) -> None:
    returns, all_of_them = doubles(1, 2, 3), doubles(1, 1, 1)
    # Perfect, perfect but for a shift, a constant, the opposite; and returns that say nothing.
    for values, expected in ((returns, 1.0), (returns + 5, 1.0), (doubles(7, 7, 7), 0.0), (-returns, -3.0)):
        sums = m.explained_variance_sums(values, returns, all_of_them)
        assert m.explained_variance(sums) == pytest.approx(expected, abs=1e-12)
    flat = m.explained_variance_sums(returns, torch.full((3,), 0.1), all_of_them)
    assert math.isnan(m.explained_variance(flat))
    assert math.isnan(m.explained_variance(m.explained_variance_sums(returns, returns, doubles(0, 0, 0))))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_finite_differences(clip: float | None) -> None:
    torch.manual_seed(0)
    old, returns, weights = torch.randn(3, 40, dtype=torch.float64)
    values = (old + torch.randn(40, dtype=torch.float64)).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return value.value_loss(x, old, returns, weights.abs(), clip)[0]

    assert torch.autograd.gradcheck(loss, (values,), eps=1e-6, atol=1e-8)
