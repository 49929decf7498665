"""Results belong to the global batch: not to its split into micro-batches or ranks, its padding, or its order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhfctl.algorithms import gae, importance, kl, masking, ppo, reward_model, sft, value
from rlhfctl.algorithms.advantages import discounted_returns
from rlhfctl.algorithms.rewards_to_tokens import token_rewards

SAMPLES, LONGEST, HIDDEN = 8, 9, 5
LENGTHS = torch.tensor([1, 9, 4, 2, 7, 9, 3, 5])
SPLITS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[0], [1], [2], [3], [4], [5], [6], [7]],
    [[0, 1, 2, 3], [4, 5, 6, 7]],  # two ranks of four
    [[0], [1, 2, 3, 4, 5, 6, 7]],
    [[5, 1, 7], [0, 3], [6, 4, 2]],  # another order
]


class Batch:
    """Eight samples of uneven length; log-probabilities and values are linear in `theta`, the parameters."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.features = normal(SAMPLES, LONGEST, HIDDEN)
        self.theta = normal(HIDDEN).requires_grad_()
        now = (self.features @ self.theta).detach() - 4
        self.old = now + 0.3 * normal(SAMPLES, LONGEST)
        self.ref = now + 0.3 * normal(SAMPLES, LONGEST)
        self.sampler = self.old + 0.3 * normal(SAMPLES, LONGEST)
        self.advantages = normal(SAMPLES, LONGEST)
        self.returns = now + normal(SAMPLES, LONGEST)

    def logprobs(self, rows: list[int]) -> Tensor:
        return self.features[rows] @ self.theta - 4


Loss = Callable[[Batch, list[int], Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, dict[str, Tensor]]]


def policy(
    b: Batch, rows: list[int], weights: Tensor, take: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict]:
    old, sampler = take(b.old[rows]), take(b.sampler[rows])
    correction, _ = importance.truncated_weights(old, sampler, 1.2)
    now, advantages = take(b.logprobs(rows)), take(b.advantages[rows])
    return ppo.policy_loss(now, old, advantages, weights, 0.2, 0.3, 1.5, correction)


def critic(
    b: Batch, rows: list[int], weights: Tensor, take: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict]:
    return value.value_loss(take(b.logprobs(rows)), take(b.old[rows]), take(b.returns[rows]), weights, 0.2)


def penalty(
    b: Batch, rows: list[int], weights: Tensor, take: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict]:
    return kl.kl_loss(take(b.logprobs(rows)), take(b.ref[rows]), weights, "k3")


def supervised(
    b: Batch, rows: list[int], weights: Tensor, take: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict]:
    return sft.cross_entropy(take(b.logprobs(rows)), weights)


def pairs(
    b: Batch, rows: list[int], weights: Tensor, take: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict]:
    chosen, margins = take(b.logprobs(rows)), take(b.advantages[rows]).abs()
    return reward_model.pairwise_loss(chosen, take(b.old[rows]), margins, weights, 0.1)


def right_or_wrong(
    b: Batch, rows: list[int], weights: Tensor, take: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict]:
    return reward_model.binary_loss(take(b.logprobs(rows)), take(b.returns[rows]).sigmoid(), weights)


LOSSES = {
    "policy": policy,
    "value": critic,
    "kl": penalty,
    "sft": supervised,
    "pairwise": pairs,
    "binary": right_or_wrong,
}


def total(
    loss: Loss, split: list[list[int]], loss_mean: str, padded: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient and metric sums, added up over the parts of the global batch."""
    b = Batch()
    found, sums = torch.zeros((), dtype=torch.float64), {}
    for rows in split:
        lengths = LENGTHS[rows]
        mask = masking.length_mask(lengths, LONGEST)
        weights = masking.token_weights(lengths, loss_mean, int(LENGTHS.sum()), SAMPLES, LONGEST).double()
        if padded:
            token_weights = weights[:, None] * mask
            part, metrics = loss(b, rows, token_weights, lambda x: x)
        else:
            token_weights = masking.per_token(weights, lengths)
            part, metrics = loss(b, rows, token_weights, lambda x, mask=mask: x[mask])
        part.backward()
        found += part.detach()
        for name, number in metrics.items():
            sums[name] = sums.get(name, 0) + number
    assert b.theta.grad is not None
    return found, b.theta.grad, sums


@pytest.mark.parametrize("loss_mean", masking.LOSS_MEANS)
@pytest.mark.parametrize("name", LOSSES)
def test_splits_padding_and_order_change_nothing(name: str, loss_mean: str) -> None:
    expected, gradient, sums = total(LOSSES[name], SPLITS[0], loss_mean, padded=False)
    assert gradient.abs().min() > 1e-6
    for split in SPLITS:
        for padded in (False, True):
            found, slope, numbers = total(LOSSES[name], split, loss_mean, padded)
            assert_close(found, expected, rtol=1e-12, atol=1e-13)
            assert_close(slope, gradient, rtol=1e-12, atol=1e-13)
            assert numbers.keys() == sums.keys()
            for key in sums:
                assert_close(numbers[key], sums[key], rtol=1e-12, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("loss_mean", masking.LOSS_MEANS)
def test_the_three_means_are_what_they_are_called(loss_mean: str) -> None:
    b = Batch()
    nll = [-b.logprobs([row])[0, : LENGTHS[row]].detach() for row in range(SAMPLES)]
    expected = {
        "token": torch.cat(nll).mean(),
        "sequence": torch.stack([row.mean() for row in nll]).mean(),
        "constant": torch.cat(nll).sum() / (SAMPLES * LONGEST),
    }
    found, _, _ = total(supervised, SPLITS[0], loss_mean, padded=False)
    assert_close(found, expected[loss_mean], rtol=1e-6, atol=0)  # the weights are float32


def rewarded() -> tuple[Tensor, Tensor, Tensor]:
    """Per-token rewards, values and the mask of the batch."""
    b = Batch()
    mask = masking.length_mask(LENGTHS, LONGEST)
    scores = torch.arange(SAMPLES, dtype=torch.float64)
    rewards = token_rewards(scores, mask, kl.kl(b.old, b.ref, "k1"), 0.1)
    return rewards, b.returns, mask


def widened(x: Tensor, filler: float) -> Tensor:
    """Four columns more on the right."""
    return torch.cat([x, torch.full((len(x), 4), filler, dtype=x.dtype)], 1)


def test_wider_padding_changes_no_advantage() -> None:
    rewards, values, mask = rewarded()
    advantages, returns = gae.gae(rewards, values, mask, 0.98, 0.95)
    wide_mask = widened(mask.double(), 0.0)
    for junk in (3.0, float("nan")):
        wide = gae.gae(widened(rewards, 0.0), widened(values, junk), wide_mask, 0.98, 0.95)
        assert torch.equal(wide[0][:, :LONGEST], advantages)
        assert torch.equal(wide[1][:, :LONGEST], returns)
        assert torch.equal(
            gae.whiten(widened(advantages, junk), wide_mask)[:, :LONGEST], gae.whiten(advantages, mask)
        )
    flat = discounted_returns(rewards, mask, 0.98)
    assert torch.equal(discounted_returns(widened(rewards, 0.0), wide_mask, 0.98)[:, :LONGEST], flat)


def test_samples_do_not_see_each_other_before_whitening() -> None:
    rewards, values, mask = rewarded()
    advantages, _ = gae.gae(rewards, values, mask, 0.98, 0.95)
    for row in range(SAMPLES):
        alone, _ = gae.gae(rewards[[row]], values[[row]], mask[[row]], 0.98, 0.95)
        assert torch.equal(alone[0], advantages[row])


@pytest.mark.parametrize("split", SPLITS)
def test_whitening_by_the_sums_of_all_ranks(split: list[list[int]]) -> None:
    rewards, values, mask = rewarded()
    advantages, _ = gae.gae(rewards, values, mask, 0.98, 0.95)
    expected = gae.whiten(advantages, mask)
    parts = [gae.whiten_sums(advantages[rows], mask[rows]) for rows in split]
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    for rows in split:
        assert_close(gae.whiten(advantages[rows], mask[rows], sums), expected[rows], rtol=1e-12, atol=1e-13)
    # And it is what it says: mean 0, population variance 1 over tokens.
    assert_close(expected[mask].mean(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(expected[mask].var(correction=0), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("split", SPLITS)
def test_explained_variance_by_the_sums_of_all_ranks(split: list[list[int]]) -> None:
    _, values, mask = rewarded()
    returns = Batch().advantages + values
    parts = [value.explained_variance_sums(values[rows], returns[rows], mask[rows]) for rows in split]
    sums = {name: sum(part[name] for part in parts) for name in parts[0]}
    error = (returns - values)[mask].var(correction=0)
    expected = 1 - float(error / returns[mask].var(correction=0))
    assert value.explained_variance(sums) == pytest.approx(expected, abs=1e-12)
