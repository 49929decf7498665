"""Hand numbers for OREO's losses and their gradients. They take the module, so that test_mutations.py can break it."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhfctl.algorithms import oreo


@pytest.fixture(name="m")
def module() -> ModuleType:
    return oreo


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# beta .5; row 0 has 4 tokens, row 1 two (the rest is padding of nonsense), weights .5 each; R = 1 and 0.
# row 0: l .2 -.4 .6 .1 -> S .5 .3 .7 .1; V .3 .2 .1 .4 -> residual V - 1 + S/2: -.45 -.65 -.55 -.55
# row 1: l .4 -.2       -> S .2 -.2;      V .5 .6       -> residual V - 0 + S/2: .6 .5
L = table([0.2, -0.4, 0.6, 0.1], [0.4, -0.2, 9.0, math.nan])
V = table([0.3, 0.2, 0.1, 0.4], [0.5, 0.6, -7.0, math.inf])
R = table([1, 1, 1, 1], [0, 0, 0, 0])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
STEPS = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
W = torch.tensor([0.5, 0.5], dtype=torch.float64)
BETA = 0.5
RESIDUAL = table([-0.45, -0.65, -0.55, -0.55], [0.6, 0.5, 0, 0])


def policy(m: ModuleType, level: str) -> tuple[float, Tensor, dict[str, Tensor], Tensor, Tensor]:
    ratios, values = L.clone().requires_grad_(), V.clone().requires_grad_()
    loss, metrics = m.policy_loss(ratios, values, R, m.units_of(level, STEPS), MASK, W, BETA)
    loss.backward()
    assert values.grad is None  # V is a constant
    assert ratios.grad is not None
    return float(loss.detach()), ratios.grad, metrics, ratios, values


def near(found: float, expected: float) -> None:
    assert abs(found - expected) < 1e-12


def test_suffix_sums_skip_what_is_no_action(m: ModuleType) -> None:
    assert_close(m.suffix_sums(L, MASK)[0], table([0.5, 0.3, 0.7, 0.1])[0])
    assert_close(m.suffix_sums(L, MASK)[1, :2], table([0.2, -0.2])[0])
    hole = torch.tensor([[1, 0, 0, 1]]).bool()  # an observation between two turns
    assert m.suffix_sums(L[:1], hole)[0, 0] == pytest.approx(0.3)


def test_factors_of_steps_weigh_the_residuals(m: ModuleType) -> None:
    # Steps 0 and 1 weigh 1 and 3. Row 0, tokens: (.2025 + .4225 + 3 * .3025 + 3 * .3025) / 8 = .305
    # row 1: (.36 + 3 * .25) / 4 = .2775; half of each: .29125. By steps: (.2025 + 3 * .3025) / 4, row 1 the same.
    factors = m.step_factors(torch.tensor([1.0, 3.0], dtype=torch.float64), STEPS)
    assert_close(factors, table([1, 1, 3, 3], [1, 3, 1, 1]))
    assert m.step_factors(torch.tensor([2.0, 5.0]), torch.tensor([[0, 1, 2, 7]])).tolist() == [[2, 5, 5, 5]]
    targets = m.value_targets(L, R, MASK, BETA)
    for level, expected in (("token", 0.29125), ("step", 0.2775)):
        loss, _ = m.policy_loss(L, V, R, m.units_of(level, STEPS), MASK, W, BETA, factors)
        near(float(loss), expected)
        starts = m.value_starts(level, STEPS, MASK)
        near(float(m.value_loss(V, targets, starts, W, factors)), expected)
        even = torch.full_like(factors, 7.0)
        plain, _ = m.policy_loss(L, V, R, m.units_of(level, STEPS), MASK, W, BETA)
        near(
            float(m.policy_loss(L, V, R, m.units_of(level, STEPS), MASK, W, BETA, even)[0]),
            float(plain),
        )


def test_token_level(m: ModuleType) -> None:
    # row 0: (.2025 + .4225 + .3025 + .3025) / 4 = .3075; row 1: (.36 + .25) / 2 = .305; half of each: .30625
    loss, gradient, metrics, *_ = policy(m, "token")
    near(loss, 0.30625)
    expected = (
        2 * BETA * RESIDUAL * table([0.5 / 4] * 4, [0.5 / 2] * 4)
    )  # 2 beta residual / T, the own token's alone
    assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert metrics["units"] == 6
    near(float(metrics["residual"]), -1.1)
    near(float(metrics["absolute"]), 3.3)


def test_step_level(m: ModuleType) -> None:
    # row 0: steps start at 0 and 2: (.2025 + .3025) / 2 = .2525; row 1: two steps of one token, .305
    loss, gradient, metrics, *_ = policy(m, "step")
    near(loss, 0.5 * 0.2525 + 0.5 * 0.305)
    assert metrics["units"] == 4
    # each token of a step has the gradient of its step's residual
    expected = table([-0.45, -0.45, -0.55, -0.55], [0.6, 0.5, 0, 0]) * 2 * BETA * 0.25
    assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_response_level(m: ModuleType) -> None:
    loss, gradient, metrics, *_ = policy(m, "response")
    near(loss, 0.5 * 0.2025 + 0.5 * 0.36)
    assert metrics["units"] == 2
    assert_close(gradient, table([-0.45] * 4, [0.6, 0.6, 0, 0]) * 2 * BETA * 0.5, rtol=0, atol=1e-12)


def test_levels_meet_where_they_are_one(m: ModuleType) -> None:
    single, whole = torch.arange(4).expand(2, 4), torch.zeros(2, 4, dtype=torch.long)
    for steps, level in ((single, "token"), (whole, "response")):
        expected = policy(m, level)
        ratios = L.clone().requires_grad_()
        loss, _ = m.policy_loss(ratios, V, R, m.units_of("step", steps), MASK, W, BETA)
        loss.backward()
        near(float(loss.detach()), expected[0])
        assert ratios.grad is not None
        assert_close(ratios.grad, expected[1], rtol=0, atol=0)


def test_the_value_loss_is_the_same_number_with_the_values_gradient(m: ModuleType) -> None:
    for level in ("token", "step"):
        ratios, values = L.clone().requires_grad_(), V.clone().requires_grad_()
        targets = m.value_targets(ratios, R, MASK, BETA)
        starts = m.value_starts(level, STEPS, MASK)
        loss = m.value_loss(values, targets, starts, W)
        loss.backward()
        near(float(loss.detach()), policy(m, level)[0])
        assert ratios.grad is None
        assert not targets.requires_grad
        wanted = R.clone().requires_grad_()
        m.value_loss(values, wanted, starts, W).backward()
        assert wanted.grad is None
        values.grad = None
        m.value_loss(values, targets, starts, W).backward()
        count = starts.sum(1, keepdim=True)
        assert values.grad is not None
        expected = torch.where(starts, RESIDUAL, 0.0) * 2 * 0.5 / count
        assert_close(values.grad, expected, rtol=0, atol=1e-12)


def test_at_response_level_every_state_has_a_value(m: ModuleType) -> None:
    assert torch.equal(m.value_starts("response", STEPS, MASK), MASK)
    assert m.value_starts("step", STEPS, MASK).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]


def test_at_the_reference_v_regresses_to_the_reward(m: ModuleType) -> None:
    assert_close(m.value_targets(torch.zeros(2, 4), R, MASK, BETA), R)
    returns = R.clone().requires_grad_()
    assert not m.value_targets(L, returns, MASK, BETA).requires_grad


def test_units_that_end_with_the_mask_start_anew_behind_it(m: ModuleType) -> None:
    units, mask = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[1, 0, 1, 1]]).bool()
    assert m.unit_starts(units, mask).tolist() == [[1, 0, 1, 1]]


def test_the_mean_over_tokens(m: ModuleType) -> None:
    # row 0: (.3 + .2 + .1 + .4) / 4 = .25, row 1: (.5 + .6) / 2 = .55
    near(float(m.token_mean(V, MASK, W)), 0.5 * 0.25 + 0.5 * 0.55)


def test_a_row_without_actions_adds_nothing(m: ModuleType) -> None:
    none = torch.zeros(1, 4, dtype=torch.bool)
    loss, metrics = m.policy_loss(L[1:], V[1:], R[1:], STEPS[1:], none, W[1:], BETA)
    assert (float(loss), int(metrics["units"])) == (0.0, 0)


def test_an_unknown_level(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="level is 'word'"):
        m.units_of("word", STEPS)


def test_parts_of_a_batch_add_up(m: ModuleType) -> None:
    whole = policy(m, "token")[0]
    parts = [
        float(m.policy_loss(L[i : i + 1], V[i : i + 1], R[i : i + 1], m.units_of("token", STEPS[i : i + 1]),
                            MASK[i : i + 1], W[i : i + 1], BETA)[0])
        for i in range(2)
    ]  # fmt: skip
    near(sum(parts), whole)


def test_the_fixed_point_of_a_bandit() -> None:
    """One step, three arms: log(pi / ref) = (r - V) / beta and V = beta log E_ref exp(r / beta)."""
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    rewards, beta = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), 0.7
    logits, value = (
        reference.clone().requires_grad_(),
        torch.zeros(1, dtype=torch.float64, requires_grad=True),
    )
    optimizer = torch.optim.Adam([logits, value], lr=0.02)
    mask, weights = torch.ones(3, 1).bool(), reference.exp()
    for _ in range(3000):
        ratios = (logits.log_softmax(0) - reference)[:, None]
        returns, values = rewards[:, None], value.expand(3)[:, None]
        units = torch.zeros(3, 1, dtype=torch.long)
        loss, _ = oreo.policy_loss(ratios, values, returns, units, mask, weights, beta)
        loss = loss + oreo.value_loss(values, oreo.value_targets(ratios, returns, mask, beta), mask, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = beta * torch.logsumexp(reference + rewards / beta, 0)
    assert float(value.detach()) == pytest.approx(float(expected), abs=1e-3)
    assert_close((logits.log_softmax(0) - reference).detach(), (rewards - expected) / beta, rtol=0, atol=2e-3)
