"""Hand numbers for the reward-model losses. They take the module, so that test_mutations.py can break it."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import reward_model


@pytest.fixture(name="m")
def module() -> ModuleType:
    return reward_model


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: torch.Tensor, expected: float, atol: float = 1e-14) -> None:
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


LOG3 = math.log(3)


def test_pairs_by_hand(m: ModuleType) -> None:
    # gaps log 3, -log 3, 0 with margins 0: p = 3/4, 1/4, 1/2 -> log 4/3, log 4, log 2
    chosen, rejected = doubles(LOG3, 1, 2), doubles(0, 1 + LOG3, 2)
    loss, metrics = m.pairwise_loss(chosen, rejected, doubles(0, 0, 0), doubles(0.5, 0.25, 0.25))
    close(loss, 0.5 * math.log(4 / 3) + 0.25 * math.log(4) + 0.25 * math.log(2))
    assert metrics["pairs"] == 3
    assert metrics["correct"] == 1.5  # right, wrong, tie
    close(metrics["gap"], 0.0)


def test_the_margin_raises_the_loss_alone(m: ModuleType) -> None:
    # gap 2 log 3, margin log 3: p = 3/4; the gap itself and the accuracy stay
    loss, metrics = m.pairwise_loss(doubles(2 * LOG3), doubles(0), doubles(LOG3), doubles(1))
    close(loss, math.log(4 / 3))
    close(metrics["gap"], 2 * LOG3)
    assert metrics["correct"] == 1
    _, short = m.pairwise_loss(doubles(0.5), doubles(0), doubles(LOG3), doubles(1))
    assert short["correct"] == 1  # ordered rightly, though by less than the margin


def test_centering_by_hand(m: ModuleType) -> None:
    loss, _ = m.pairwise_loss(doubles(3), doubles(-1), doubles(0), doubles(0.5), 0.1)
    close(loss, 0.5 * (math.log1p(math.exp(-4)) + 0.1 * 4))


def test_gradients_of_a_pair(m: ModuleType) -> None:
    # d loss / d chosen = -(1 - p) = -1/4, d / d rejected = +1/4: chosen is pushed up
    chosen, rejected = doubles(LOG3).requires_grad_(), doubles(0).requires_grad_()
    loss, metrics = m.pairwise_loss(chosen, rejected, doubles(0), doubles(1))
    loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert_close(chosen.grad, doubles(-0.25), rtol=0, atol=1e-15)
    assert_close(rejected.grad, doubles(0.25), rtol=0, atol=1e-15)
    assert not metrics["gap"].requires_grad


def test_huge_gaps_do_not_overflow(m: ModuleType) -> None:
    for gap, expected in ((1000.0, 0.0), (-1000.0, 1000.0)):
        chosen = torch.tensor([gap]).requires_grad_()
        loss, _ = m.pairwise_loss(chosen, torch.zeros(1), torch.zeros(1), torch.ones(1))
        loss.backward()
        assert loss.item() == expected
        assert chosen.grad is not None
        assert torch.isfinite(chosen.grad).all()


def test_pairs_of_weight_zero_take_no_part(m: ModuleType) -> None:
    for junk in (5.0, math.nan, math.inf):
        for side in range(3):
            parts = [doubles(1, 0), doubles(0, 0), doubles(0, 0)]
            parts[side][1] = -junk if side == 2 else junk
            parts = [part.requires_grad_() for part in parts]
            loss, metrics = m.pairwise_loss(*parts, doubles(1, 0), 0.5)
            loss.backward()
            close(loss.detach(), math.log1p(math.exp(-1)) + 0.5)
            assert metrics["pairs"] == 1
            assert metrics["correct"] == 1
            assert metrics["gap"] == 1
            assert parts[0].grad is not None
            assert parts[0].grad[1] == 0


def test_a_negative_margin_is_refused(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="margin is negative"):
        m.pairwise_loss(doubles(1), doubles(0), doubles(-0.1), doubles(1))


def test_binary_by_hand(m: ModuleType) -> None:
    # sigmoid(log 3) = 3/4: good -> log 4/3, bad -> log 4; target 1/4 -> 1/4 log 4/3 + 3/4 log 4
    scores = doubles(LOG3, LOG3, LOG3)
    loss, metrics = m.binary_loss(scores, doubles(1, 0, 0.25), doubles(0.5, 0.25, 1))
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(4) + 0.25 * math.log(4 / 3) + 0.75 * math.log(4)
    close(loss, expected)
    assert metrics == {"count": 3, "correct": 1}
    _, both = m.binary_loss(doubles(-1, 1, -1, 0), doubles(0, 1, 0.6, 0), doubles(1, 1, 1, 1))
    assert both["correct"] == 3
    _, sides = m.binary_loss(doubles(0.3, 0.3), doubles(0.5, 0.5), doubles(1, 1))
    assert sides["correct"] == 0  # one half is not good


def test_binary_gradient_is_probability_minus_target(m: ModuleType) -> None:
    scores = doubles(LOG3, -LOG3).requires_grad_()
    loss, _ = m.binary_loss(scores, doubles(1, 1), doubles(1, 2))
    loss.backward()
    assert scores.grad is not None
    assert_close(scores.grad, doubles(-0.25, -1.5), rtol=0, atol=1e-15)


def test_binary_extremes_and_weights(m: ModuleType) -> None:
    loss, _ = m.binary_loss(doubles(1000, -1000), doubles(0, 1), doubles(1, 1))
    assert loss == 2000
    for junk in (math.nan, math.inf):
        scores = doubles(0, junk).requires_grad_()
        loss, metrics = m.binary_loss(scores, doubles(1, junk), doubles(1, 0))
        loss.backward()
        close(loss.detach(), math.log(2))
        assert metrics == {"count": 1, "correct": 0}  # a score of 0 calls nothing good
        assert scores.grad is not None
        assert scores.grad[1] == 0
    _, unweighted = m.binary_loss(doubles(-1, -1), doubles(0, 0), doubles(1, 0))
    assert unweighted == {"count": 1, "correct": 1}
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match="not a probability"):
            m.binary_loss(doubles(0), doubles(outside), doubles(1))


def test_sums_of_tokens(m: ModuleType) -> None:
    tokens = doubles(1, 2, 4, 8, 16).requires_grad_()
    sums = m.segment_sums(tokens, torch.tensor([0, -1, 2, 0, 2]), 4)
    assert sums.tolist() == [9, 0, 20, 0]
    (sums * doubles(1, 1, 3, 1)).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [1, 0, 3, 1, 3]


def test_calibration_by_hand(m: ModuleType) -> None:
    # bin of .9: mean confidence .9, share right .5; bin of .6: .6 and 1; mean of the two gaps
    confidences = doubles(0.95, 0.95, 0.65, 0.65)
    assert m.calibration_error(confidences, doubles(1, 0, 1, 1)) == pytest.approx(0.4, abs=1e-15)
    assert m.calibration_error(doubles(1.0, 0.0), doubles(1, 0)) == 0.0
    # 0.75 and 0.85 lie in two bins of ten and in one of two: the errors cancel there
    two = (doubles(0.75, 0.85), doubles(1, 0))
    assert m.calibration_error(*two) == pytest.approx(0.55, abs=1e-15)
    assert m.calibration_error(*two, bins=2) == pytest.approx(0.3, abs=1e-15)
    assert m.calibration_error(doubles(0.25, 0.75), doubles(1, 0), bins=2) == pytest.approx(0.75, abs=1e-15)
    assert math.isnan(m.calibration_error(doubles(), doubles()))


def test_area_under_the_curve(m: ModuleType) -> None:
    good = torch.tensor([True, True, False, False])
    assert m.area_under_curve(doubles(3, 1, 2, 0), good) == 0.75
    assert m.area_under_curve(doubles(1, 1, 1, 0), good) == 0.75  # ties count half
    assert m.area_under_curve(doubles(0, 0, 1, 1), good) == 0.0
    assert math.isnan(m.area_under_curve(doubles(1, 2), torch.tensor([True, True])))
    assert math.isnan(m.area_under_curve(doubles(1, 2), torch.tensor([False, False])))


def test_gradcheck() -> None:
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    margins, weights = torch.rand(5).double(), torch.rand(5).double()
    assert torch.autograd.gradcheck(
        lambda a, b: reward_model.pairwise_loss(a, b, margins, weights, 0.3)[0], (chosen, rejected)
    )
    assert torch.autograd.gradcheck(
        lambda a: reward_model.binary_loss(a, torch.rand(5).double().fill_(0.3), weights)[0], (chosen,)
    )
    segments = torch.tensor([0, 1, 1, -1, 0])
    assert torch.autograd.gradcheck(lambda a: reward_model.segment_sums(a, segments, 3), (chosen,))


def test_equals_torch() -> None:
    torch.manual_seed(1)
    chosen, rejected = torch.randn(50).double(), torch.randn(50).double()
    loss, _ = reward_model.pairwise_loss(
        chosen, rejected, torch.zeros(50).double(), torch.full((50,), 0.02, dtype=torch.float64)
    )
    assert_close(loss, -torch.nn.functional.logsigmoid(chosen - rejected).mean(), rtol=0, atol=1e-14)
    targets = torch.rand(50).double()
    binary, _ = reward_model.binary_loss(chosen, targets, torch.full((50,), 0.02, dtype=torch.float64))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(chosen, targets)
    assert_close(binary, expected, rtol=0, atol=1e-14)


def test_a_pairwise_loss_is_the_binary_loss_of_the_gap() -> None:
    chosen, rejected = doubles(0.3, -2), doubles(1, 0.5)
    pairwise, _ = reward_model.pairwise_loss(chosen, rejected, doubles(0, 0), doubles(1, 1))
    binary, _ = reward_model.binary_loss(chosen - rejected, doubles(1, 1), doubles(1, 1))
    assert_close(pairwise, binary, rtol=0, atol=1e-14)
