"""Hand numbers for the KL estimators. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import kl


@pytest.fixture(name="m")
def module() -> ModuleType:
    return kl


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_numbers(m: ModuleType) -> None:
    # d = log 2 and -log 2: k1 = +-.6931; k2 = .6931^2 / 2; k3 = 1/2 - 1 + .6931 and 2 - 1 - .6931
    log2 = math.log(2)
    logprobs, ref = doubles(-1, -1), doubles(-1 - log2, -1 + log2)
    expected = {
        "k1": doubles(log2, -log2),
        "k2": doubles(log2**2 / 2, log2**2 / 2),
        "k3": doubles(log2 - 0.5, 1 - log2),
    }
    for estimator, numbers in expected.items():
        assert_close(m.kl(logprobs, ref, estimator), numbers, rtol=0, atol=1e-15)


def test_k1_and_k3_are_unbiased_under_the_first_argument(m: ModuleType) -> None:
    # pi = (.7, .2, .1), ref = (.5, .25, .25): KL(pi||ref) = .7 log 1.4 + .2 log .8 + .1 log .4 = .0992733
    pi, ref = doubles(0.7, 0.2, 0.1), doubles(0.5, 0.25, 0.25)
    exact = 0.7 * math.log(1.4) + 0.2 * math.log(0.8) + 0.1 * math.log(0.4)
    for estimator in ("k1", "k3"):
        mean = (pi * m.kl(pi.log(), ref.log(), estimator)).sum()
        assert_close(mean, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-14)


def test_k3_keeps_its_digits_near_zero_in_float32(m: ModuleType) -> None:
    # d = 1e-4: k3 = d^2 / 2 - d^3 / 6 = 5e-9; exp(-d) - 1 + d in float32 gives 0 or 1.2e-7.
    found = m.kl(torch.tensor([1e-4]), torch.tensor([0.0]), "k3")
    assert_close(found, torch.tensor([5e-9]), rtol=0.02, atol=0)


def test_nothing_is_clamped(m: ModuleType) -> None:
    d = doubles(-30)
    assert_close(m.kl(d, doubles(0), "k1"), d, rtol=0, atol=0)
    assert_close(m.kl(d, doubles(0), "k2"), doubles(450), rtol=0, atol=0)
    assert_close(m.kl(d, doubles(0), "k3"), doubles(math.exp(30) - 31), rtol=1e-14, atol=0)


def test_gradients(m: ModuleType) -> None:
    # d k1 / d logp = 1, d k2 / d logp = d, d k3 / d logp = 1 - exp(-d), at d = log 2: 1, .6931, .5
    log2 = math.log(2)
    for estimator, slope in (("k1", 1.0), ("k2", log2), ("k3", 0.5)):
        logprobs = doubles(-1).requires_grad_()
        m.kl(logprobs, doubles(-1 - log2), estimator).sum().backward()
        assert logprobs.grad is not None
        assert_close(logprobs.grad, doubles(slope), rtol=0, atol=1e-15)


def test_sums_over_the_mask(m: ModuleType) -> None:
    # d = log 2, 21, -21 and a masked NaN; |d| > 20 twice; exactly 20 is not large.
    log2 = math.log(2)
    logprobs = doubles(log2, 21, -21, 20, math.nan).requires_grad_()
    found = m.kl_sums(logprobs, doubles(0, 0, 0, 0, 0), doubles(1, 1, 1, 1, 0))
    assert found["tokens"] == 4
    assert found["large"] == 2
    assert_close(found["k1"], torch.tensor(log2 + 20, dtype=torch.float64), rtol=0, atol=1e-13)
    assert_close(found["k2"], torch.tensor(log2**2 / 2 + 441 + 200, dtype=torch.float64), rtol=0, atol=1e-12)
    k3 = (0.5 - 1 + log2) + (math.exp(-21) + 20) + (math.exp(21) - 22) + (math.exp(-20) + 19)
    assert_close(found["k3"], torch.tensor(k3, dtype=torch.float64), rtol=1e-14, atol=0)
    assert not any(value.requires_grad for value in found.values())


def test_sums_without_a_mask_take_every_token(m: ModuleType) -> None:
    found = m.kl_sums(doubles(1, 2), doubles(0, 0))
    assert found["tokens"] == 2
    assert found["k1"] == 3
    assert found["large"] == 0


def test_loss_is_the_weighted_sum_and_pulls_towards_the_reference(m: ModuleType) -> None:
    # k3 at d = log 2 (.1931) and d = -log 2 (.3069), weights 1/4 and 1/2; slopes 1 - exp(-d) = 1/2 and -1
    log2 = math.log(2)
    logprobs = doubles(-1, -1, math.nan).requires_grad_()
    ref = doubles(-1 - log2, -1 + log2, 0).requires_grad_()
    loss, sums = m.kl_loss(logprobs, ref, doubles(0.25, 0.5, 0), "k3")
    assert_close(
        loss, torch.tensor(0.25 * (log2 - 0.5) + 0.5 * (1 - log2), dtype=torch.float64), rtol=0, atol=1e-15
    )
    assert sums["tokens"] == 2
    assert_close(sums["k3"], torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=1e-15)
    loss.backward()
    # Too likely: made less likely (positive slope). Too unlikely: made likelier. The reference is fixed.
    assert logprobs.grad is not None
    assert_close(logprobs.grad, doubles(0.125, -0.5, 0), rtol=0, atol=1e-15)
    assert ref.grad is None


def test_unknown_estimator(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="'k4': one of k1, k2, k3"):
        m.kl(doubles(0), doubles(0), "k4")
