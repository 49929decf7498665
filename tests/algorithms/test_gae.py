"""Hand numbers for GAE and whitening. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import gae


@pytest.fixture(name="m")
def module() -> ModuleType:
    return gae


def doubles(*values: float | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_three_tokens(m: ModuleType) -> None:
    # gamma .9, lambda .5, gamma * lambda = .45; V = 1, 2, 3; r = .5, -1, 4
    #   delta_2 =  4             - 3 =  1.0                        A_2 =  1
    #   delta_1 = -1 + .9 * 3    - 2 = -0.3                        A_1 = -0.3 + .45 * 1    = 0.15
    #   delta_0 = .5 + .9 * 2    - 1 =  1.3                        A_0 =  1.3 + .45 * .15  = 1.3675
    advantages, returns = m.gae(doubles([0.5, -1, 4]), doubles([1, 2, 3]), doubles([1, 1, 1]), 0.9, 0.5)
    assert_close(advantages, doubles([1.3675, 0.15, 1.0]), rtol=0, atol=1e-14)
    assert_close(returns, doubles([2.3675, 2.15, 4.0]), rtol=0, atol=1e-14)


def test_observation_tokens_are_removed_before_the_recursion(m: ModuleType) -> None:
    # Two turns of two tokens with two observation tokens between, gamma 1, lambda .95, reward 1 at the end;
    # V = .5, .4 | .3, .2 on the policy's tokens, anything on the observation:
    #   A_5 = 1 - .2               = .8
    #   A_4 = .2 - .3 + .95 * .8   = .66
    #   A_1 = .3 - .4 + .95 * .66  = .527
    #   A_0 = .4 - .5 + .95 * .527 = .40065
    # Zeroing values in place instead gives A_1 = -.4 + .95^2 * (.3 + .95 * .66) = .4366 and A_0 = .3148.
    rewards, mask = doubles([0, 0, 0, 0, 0, 1]), doubles([1, 1, 0, 0, 1, 1])
    for observed in (0.0, 0.9, math.nan):
        values = doubles([0.5, 0.4, observed, observed, 0.3, 0.2])
        advantages, returns = m.gae(rewards, values, mask, 1.0, 0.95)
        assert_close(advantages, doubles([0.40065, 0.527, 0, 0, 0.66, 0.8]), rtol=0, atol=1e-14)
        assert_close(returns, doubles([0.90065, 0.927, 0, 0, 0.96, 1.0]), rtol=0, atol=1e-14)


def test_padding_is_behind_the_end(m: ModuleType) -> None:
    # The first row ends after two tokens: what stands behind is not its future. gamma 1, lambda 1: A = G - V.
    rewards = doubles([0, 1, 0], [0, 0, 1])
    values = doubles([0.5, 0.25, 9], [0.5, 0.25, 0.75])
    advantages, returns = m.gae(rewards, values, doubles([1, 1, 0], [1, 1, 1]), 1.0, 1.0)
    assert_close(advantages, doubles([0.5, 0.75, 0], [0.5, 0.75, 0.25]), rtol=0, atol=1e-14)
    assert_close(returns, doubles([1, 1, 0], [1, 1, 1]), rtol=0, atol=1e-14)


def test_a_row_without_tokens_gives_zeros(m: ModuleType) -> None:
    advantages, returns = m.gae(doubles([0, 0]), doubles([5, 6]), doubles([0, 0]), 1.0, 0.95)
    assert advantages.tolist() == [[0, 0]]
    assert returns.tolist() == [[0, 0]]


def test_a_reward_outside_the_mask_is_refused(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="1 rewards stand outside the response mask"):
        m.gae(doubles([0, 1]), doubles([0, 0]), doubles([1, 0]), 1.0, 0.95)


def test_whitening_uses_the_population_variance_of_masked_tokens(m: ModuleType) -> None:
    # 1, 2, 3, 6: mean 3, squared distances 4 + 1 + 0 + 9 = 14, variance 14 / 4 = 3.5; 100 is masked.
    x, mask = doubles([1, 2, 100], [3, 6, math.nan]), doubles([1, 1, 0], [1, 1, 0])
    sd = math.sqrt(3.5 + 1e-8)
    expected = doubles([-2 / sd, -1 / sd, 0], [0, 3 / sd, 0])
    assert_close(m.whiten(x, mask), expected, rtol=0, atol=1e-14)


def test_whitening_has_its_epsilon_under_the_root(m: ModuleType) -> None:
    # 0 and 2e-4: mean 1e-4, variance 1e-8; +-1e-4 / sqrt(1e-8 + 1e-8) = +-.70710678
    found = m.whiten(doubles([0, 2e-4]), doubles([1, 1]))
    assert_close(found, doubles([-math.sqrt(0.5), math.sqrt(0.5)]), rtol=0, atol=1e-12)


def test_whitening_equal_advantages_gives_zeros_and_no_tokens_no_nan(m: ModuleType) -> None:
    found = m.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3))
    assert found.dtype == torch.float32
    assert found.abs().max() < 1e-6
    assert m.whiten(doubles([3, 4]), doubles([0, 0])).tolist() == [[0, 0]]


def test_whitening_sums_of_parts_add_up(m: ModuleType) -> None:
    # The parts of the first whitening test, as two ranks: each whitens its own rows by the sums of both.
    parts = [(doubles([1, 2, 100]), doubles([1, 1, 0])), (doubles([3, 6]), doubles([1, 1]))]
    sums = [m.whiten_sums(x, mask) for x, mask in parts]
    assert sums == [
        {"count": 2.0, "sum": 3.0, "squares": 5.0},
        {"count": 2.0, "sum": 9.0, "squares": 45.0},
    ]
    total = {name: sums[0][name] + sums[1][name] for name in sums[0]}
    sd = math.sqrt(3.5 + 1e-8)
    assert_close(m.whiten(*parts[0], total), doubles([-2 / sd, -1 / sd, 0]), rtol=0, atol=1e-14)
    assert_close(m.whiten(*parts[1], total), doubles([0, 3 / sd]), rtol=0, atol=1e-14)


def test_whitening_survives_a_large_mean_in_float32() -> None:
    # Sums of squares in float32 would lose the variance of 1 behind a mean of 4096 entirely.
    x = torch.tensor([[4095.0, 4097.0]]).repeat(1000, 1)
    found = gae.whiten(x, torch.ones_like(x))
    assert_close(found, torch.tensor([[-1.0, 1.0]]).repeat(1000, 1), rtol=0, atol=1e-6)


def test_lambda_one_is_the_return_minus_the_value_and_lambda_zero_the_residual() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    mask = torch.ones(4, 7)
    ahead = torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], 1)
    residual, _ = gae.gae(rewards, values, mask, 0.9, 0.0)
    assert_close(residual, rewards + 0.9 * ahead - values, rtol=0, atol=1e-13)
    _, monte_carlo = gae.gae(rewards, values, mask, 0.9, 1.0)
    powers = 0.9 ** torch.arange(7, dtype=torch.float64)
    assert_close(monte_carlo[:, 0], (rewards * powers).sum(1), rtol=0, atol=1e-13)


def test_inputs_are_left_alone() -> None:
    rewards, values, mask = doubles([0, 1]), doubles([1, 2]), doubles([1, 1])
    gae.gae(rewards, values, mask, 1.0, 0.95)
    gae.whiten(values, mask)
    assert (rewards.tolist(), values.tolist(), mask.tolist()) == ([[0, 1]], [[1, 2]], [[1, 1]])
