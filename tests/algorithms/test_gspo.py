"""Hand numbers for the sequence-level loss; they take the module, so that test_mutations.py can break it."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhfctl.algorithms import gspo, masking, ppo


@pytest.fixture(name="m")
def module() -> ModuleType:
    return gspo


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Four responses of 2, 1, 3 and 2 tokens; clip 1 - .2 .. 1 + .3; log-ratios chosen for their means:
#   response   log rho                       s      A    s A    clipped   min     d loss / d s per weight
#   0          log 1.2 + .5, log 1.2 - .5    1.2    2    2.4    2.4       2.4    -2   inside
#   1          log 1.5                       1.5    3    4.5    3.9       3.9     0   too high
#   2          log .5 three times, shifted   0.5   -1   -0.5   -0.8      -0.8     0   too low
#   3          log 4 + 1, log 4 - 1          4.0   -1   -4.0   -1.3      -4.0     1   far out, dual clip 3: -3, none
LENGTHS = torch.tensor([2, 1, 3, 2])
LOG_RATIOS = doubles(
    math.log(1.2) + 0.5, math.log(1.2) - 0.5,
    math.log(1.5),
    math.log(0.5) + 0.3, math.log(0.5) - 0.1, math.log(0.5) - 0.2,
    math.log(4) + 1, math.log(4) - 1,
)  # fmt: skip
ADVANTAGES = doubles(2, 2, 3, -1, -1, -1, -1, -1)
# sequence mean: 1 / (4 responses * tokens)
WEIGHTS = doubles(1 / 8, 1 / 8, 1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 8, 1 / 8)


def run(m: ModuleType, **options: object) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    old = doubles(-1, -2, -3, -0.5, -1.5, -2.5, -1, -4)
    logprobs = (old + LOG_RATIOS).requires_grad_()
    loss, metrics = m.sequence_policy_loss(logprobs, old, ADVANTAGES, WEIGHTS, LENGTHS, 0.2, 0.3, **options)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), metrics, logprobs.grad


def test_loss_and_gradient_by_hand(m: ModuleType) -> None:
    # -(2.4 + 3.9 - .8 - 4) / 4 = -.375. Response 0: -A s / (4 * 2) = -2 * 1.2 / 8 a token; response 3: 4 / 8 a token.
    loss, _, gradient = run(m)
    assert_close(loss, torch.tensor(-0.375, dtype=torch.float64), rtol=0, atol=1e-14)
    assert_close(gradient, doubles(-0.3, -0.3, 0, 0, 0, 0, 0.5, 0.5), rtol=0, atol=1e-14)


def test_metrics_by_hand(m: ModuleType) -> None:
    _, metrics, _ = run(m)
    assert metrics["tokens"] == 8
    assert metrics["clipped"] == 4  # response 1 (1 token) and response 2 (3 tokens)
    assert metrics["dual_clipped"] == 0
    assert metrics["sequences"] == 4
    assert metrics["sequences_clipped"] == 2
    assert_close(metrics["ratio"], torch.tensor(2.4 + 1.5 + 1.5 + 8, dtype=torch.float64), rtol=0, atol=1e-13)
    k3 = (LOG_RATIOS.exp() - 1 - LOG_RATIOS).sum()
    assert_close(metrics["kl_policy"], k3, rtol=0, atol=1e-13)
    assert not any(value.requires_grad for value in metrics.values())


def test_dual_clip_by_hand(m: ModuleType) -> None:
    loss, metrics, gradient = run(m, dual_clip=3.0)
    assert_close(loss, torch.tensor(-(2.4 + 3.9 - 0.8 - 3) / 4, dtype=torch.float64), rtol=0, atol=1e-14)
    assert_close(gradient, doubles(-0.3, -0.3, 0, 0, 0, 0, 0, 0), rtol=0, atol=1e-14)
    assert metrics["dual_clipped"] == 2


def test_importance_weights_scale_each_token(m: ModuleType) -> None:
    # Response 0 with .5 and 1.5: its tokens' terms add up to the same; response 3 with 0 and 1: half of it is left.
    importance = doubles(0.5, 1.5, 1, 1, 1, 1, 0, 1).requires_grad_()
    loss, _, gradient = run(m, importance=importance)
    assert_close(loss, torch.tensor(-(2.4 + 3.9 - 0.8 - 2) / 4, dtype=torch.float64), rtol=0, atol=1e-14)
    assert_close(gradient, doubles(-0.3, -0.3, 0, 0, 0, 0, 0.25, 0.25), rtol=0, atol=1e-14)
    assert importance.grad is None


def test_only_logprobs_carry_a_gradient(m: ModuleType) -> None:
    old, advantages = doubles(-1, -1).requires_grad_(), doubles(1, 1).requires_grad_()
    logprobs = doubles(-1, -1).requires_grad_()
    loss, _ = m.sequence_policy_loss(
        logprobs, old, advantages, doubles(0.5, 0.5), torch.tensor([2]), 0.2, 0.2
    )
    loss.backward()
    assert_close(logprobs.grad, doubles(-0.5, -0.5), rtol=0, atol=1e-15)
    assert old.grad is None
    assert advantages.grad is None


def test_positions_of_weight_zero_take_no_part(m: ModuleType) -> None:
    # The second token of the first response and all of the second response are nobody's: s = exp(.1) of one token.
    for junk in (50.0, math.nan, math.inf):
        logprobs = doubles(-0.9, junk, junk).requires_grad_()
        loss, metrics = m.sequence_policy_loss(
            logprobs,
            doubles(-1, 0, 0),
            doubles(2, junk, junk),
            doubles(0.5, 0, 0),
            torch.tensor([2, 1]),
            0.2,
            0.2,
            importance=doubles(1, junk, junk),
        )
        loss.backward()
        assert_close(loss.detach(), torch.tensor(-math.exp(0.1), dtype=torch.float64), rtol=0, atol=1e-15)
        assert_close(logprobs.grad, doubles(-math.exp(0.1), 0, 0), rtol=0, atol=1e-15)
        assert [int(metrics[key]) for key in ("tokens", "sequences", "clipped")] == [1, 1, 0]
        assert_close(metrics["ratio"], torch.tensor(math.exp(0.1), dtype=torch.float64), rtol=0, atol=1e-15)


def test_one_token_responses_are_the_token_loss() -> None:
    torch.manual_seed(0)
    old = -torch.rand(20, dtype=torch.float64)
    now, advantages = old + 0.3 * torch.randn_like(old), torch.randn_like(old)
    weights = torch.rand_like(old)
    mine, _ = gspo.sequence_policy_loss(
        now, old, advantages, weights, torch.ones(20, dtype=torch.long), 0.2, 0.3, 2.0
    )
    token, _ = ppo.policy_loss(now, old, advantages, weights, 0.2, 0.3, 2.0)
    assert_close(mine, token, rtol=0, atol=1e-14)


def test_finite_differences_and_splits() -> None:
    torch.manual_seed(1)
    lengths = torch.tensor([3, 1, 5, 2, 4])
    count = int(lengths.sum())
    old = -torch.rand(count, dtype=torch.float64)
    now = (old + 0.3 * torch.randn(count, dtype=torch.float64)).requires_grad_()
    advantages = masking.per_token(torch.randn(5, dtype=torch.float64), lengths)
    weights = masking.per_token(masking.token_weights(lengths, "sequence", count, 5, 9), lengths).double()

    def loss(x: Tensor) -> Tensor:
        return gspo.sequence_policy_loss(x, old, advantages, weights, lengths, 0.1, 0.1, 1.2)[0]

    assert torch.autograd.gradcheck(loss, (now,), eps=1e-6, atol=1e-8)
    whole = loss(now).detach()
    parts = torch.zeros((), dtype=torch.float64)
    for part, first in ((lengths[:2], 0), (lengths[2:], int(lengths[:2].sum()))):
        own = slice(first, first + int(part.sum()))
        parts += gspo.sequence_policy_loss(
            now.detach()[own], old[own], advantages[own], weights[own], part, 0.1, 0.1, 1.2
        )[0]
    assert_close(parts, whole, rtol=1e-13, atol=1e-14)
