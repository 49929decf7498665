"""Hand numbers for the policy loss. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhfctl.algorithms import ppo


@pytest.fixture(name="m")
def module() -> ModuleType:
    return ppo


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# One token per case, clip 1 - .2 .. 1 + .3, weight 1 each:
#   rho   A    rho A   clipped   min     note                       d loss / d logp
#   1.5   2    3.0     1.3 * 2   2.6     clipped, too high          0
#   0.5   2    1.0     0.8 * 2   1.0     low, on the safe side     -1.0 = -(rho A)
#   1.5  -1   -1.5    -1.3      -1.5     high, on the safe side     1.5
#   0.5  -1   -0.5    -0.8      -0.8     clipped, too low           0
#   1.1   2    2.2     2.2       2.2     inside                    -2.2
#   4.0  -1   -4.0    -1.3      -4.0     far out, dual clip 3: -3   4.0, with dual clip 0
RATIOS = doubles(1.5, 0.5, 1.5, 0.5, 1.1, 4.0)
ADVANTAGES = doubles(2, 2, -1, -1, 2, -1)
SURROGATES = doubles(2.6, 1.0, -1.5, -0.8, 2.2, -4.0)
GRADIENTS = doubles(0, -1.0, 1.5, 0, -2.2, 4.0)


def run(m: ModuleType, weights: Tensor, **options: object) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, metrics and the gradient on logprobs of the table's tokens."""
    old = doubles(-1, -2, -3, -0.5, -1.5, -2.5)
    logprobs = (old + RATIOS.log()).requires_grad_()
    loss, metrics = m.policy_loss(logprobs, old, ADVANTAGES, weights, 0.2, 0.3, **options)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), metrics, logprobs.grad


def test_each_case_of_the_table(m: ModuleType) -> None:
    for case in range(6):
        weights = torch.zeros(6, dtype=torch.float64)
        weights[case] = 0.25
        loss, _, gradient = run(m, weights)
        assert_close(loss, -0.25 * SURROGATES[case], rtol=0, atol=1e-14)
        expected = torch.zeros(6, dtype=torch.float64)
        expected[case] = 0.25 * GRADIENTS[case]
        assert_close(gradient, expected, rtol=0, atol=1e-14)


def test_the_loss_is_the_weighted_sum(m: ModuleType) -> None:
    # weights 1..6 over 10: -(2.6 + 2 * 1 - 3 * 1.5 - 4 * .8 + 5 * 2.2 - 6 * 4) / 10 = 16.1 / 10
    loss, metrics, gradient = run(m, doubles(0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    assert_close(loss, scalar(1.61), rtol=0, atol=1e-14)
    assert_close(gradient, doubles(0, -0.2, 0.45, 0, -1.1, 2.4), rtol=0, atol=1e-14)
    assert not any(value.requires_grad for value in metrics.values())


def test_metrics_are_sums_over_tokens(m: ModuleType) -> None:
    # The clip lowers two of six. Ratios: 1.5 + .5 + 1.5 + .5 + 1.1 + 4 = 9.1. k3(old, new) = rho - 1 - log rho.
    _, metrics, _ = run(m, torch.full((6,), 0.5, dtype=torch.float64))
    assert set(metrics) == {"tokens", "clipped", "dual_clipped", "ratio", "kl_policy"}
    assert metrics["tokens"] == 6
    assert metrics["clipped"] == 2
    assert metrics["dual_clipped"] == 0
    assert_close(metrics["ratio"], scalar(9.1), rtol=0, atol=1e-14)
    logs = 2 * math.log(1.5) + 2 * math.log(0.5) + math.log(1.1) + math.log(4)
    assert_close(metrics["kl_policy"], scalar(9.1 - 6 - logs), rtol=0, atol=1e-13)


def test_dual_clip_bounds_the_loss_of_negative_advantages_alone(m: ModuleType) -> None:
    # c = 3: only the last case (-4 < 3 * -1) changes, to -3 with no gradient; 2.6 of A = 2 stays below 3 * 2.
    ones = torch.ones(6, dtype=torch.float64)
    loss, metrics, gradient = run(m, ones, dual_clip=3.0)
    assert_close(loss, -(SURROGATES.sum() + 1.0), rtol=0, atol=1e-14)
    assert_close(gradient, doubles(0, -1.0, 1.5, 0, -2.2, 0), rtol=0, atol=1e-14)
    assert metrics["dual_clipped"] == 1
    assert metrics["clipped"] == 2


def test_importance_weights_scale_each_token(m: ModuleType) -> None:
    # weights 1 and importance 1, 2, .5, 1, 0, 1: -(2.6 + 2 * 1 - .5 * 1.5 - .8 + 0 - 4)
    importance = doubles(1, 2, 0.5, 1, 0, 1).requires_grad_()
    loss, _, gradient = run(m, torch.ones(6, dtype=torch.float64), importance=importance)
    assert_close(loss, scalar(0.95), rtol=0, atol=1e-14)
    assert_close(gradient, doubles(0, -2.0, 0.75, 0, 0, 4.0), rtol=0, atol=1e-14)
    assert importance.grad is None


def test_only_logprobs_carry_a_gradient(m: ModuleType) -> None:
    old, advantage = doubles(-1).requires_grad_(), doubles(2).requires_grad_()
    logprobs = doubles(-0.9).requires_grad_()
    loss, _ = m.policy_loss(logprobs, old, advantage, doubles(1), 0.2, 0.2)
    loss.backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, doubles(-2 * math.exp(0.1)), rtol=0, atol=1e-14)
    assert old.grad is None
    assert advantage.grad is None


def test_first_pass_with_logprobs_as_old_is_the_plain_policy_gradient(m: ModuleType) -> None:
    # rho = 1: loss -A w, gradient -A w: a good token (A > 0) is made likelier by a step against the gradient.
    logprobs = doubles(-1, -2).requires_grad_()
    loss, metrics = m.policy_loss(logprobs, logprobs, doubles(3, -4), doubles(0.5, 0.5), 0.2, 0.2)
    loss.backward()
    assert logprobs.grad is not None
    assert_close(loss.detach(), scalar(0.5), rtol=0, atol=1e-15)
    assert_close(logprobs.grad, doubles(-1.5, 2.0), rtol=0, atol=1e-15)
    assert metrics["clipped"] == 0
    assert metrics["kl_policy"] == 0
    assert metrics["ratio"] == 2


def test_positions_of_weight_zero_take_no_part(m: ModuleType) -> None:
    for junk in (50.0, math.nan, math.inf):
        logprobs = doubles(-1, junk).requires_grad_()
        loss, metrics = m.policy_loss(
            logprobs,
            doubles(-1, 0),
            doubles(2, junk),
            doubles(0.5, 0),
            0.2,
            0.2,
            dual_clip=3.0,
            importance=doubles(1, junk),
        )
        loss.backward()
        assert loss == -1.0
        assert logprobs.grad is not None
        assert logprobs.grad.tolist() == [-1.0, 0.0]
        assert {name: value.tolist() for name, value in metrics.items()} == {
            "tokens": 1,
            "clipped": 0,
            "dual_clipped": 0,
            "ratio": 1,
            "kl_policy": 0,
        }


@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_finite_differences(dual_clip: float | None) -> None:
    torch.manual_seed(0)
    old, advantages = -torch.rand(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    weights, importance = torch.rand(40, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    logprobs = (old + 0.6 * torch.randn(40, dtype=torch.float64)).requires_grad_()
    edges = doubles(0.8, 1.3, 2.0)  # kinks: no derivative there
    assert (logprobs.detach() - old).exp()[:, None].sub(edges).abs().min() > 1e-4

    def loss(x: Tensor) -> Tensor:
        return ppo.policy_loss(x, old, advantages, weights, 0.2, 0.3, dual_clip, importance)[0]

    assert torch.autograd.gradcheck(loss, (logprobs,), eps=1e-6, atol=1e-8)
