"""The tensors against slow implementations in plain floats, written from the formulas a second time.

One loop per sum, lists instead of masks, tokens removed instead of carried over: nothing of the code under test.
"""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhfctl.algorithms import masking
from rlhfctl.algorithms.advantages import GROUP_ESTIMATORS, discounted_returns, group_advantages
from rlhfctl.algorithms.gae import gae, whiten
from rlhfctl.algorithms.importance import truncated_weights
from rlhfctl.algorithms.kl import ESTIMATORS, kl, kl_sums
from rlhfctl.algorithms.ppo import policy_loss
from rlhfctl.algorithms.rewards_to_tokens import token_rewards
from rlhfctl.algorithms.sft import cross_entropy
from rlhfctl.algorithms.value import explained_variance, explained_variance_sums, value_loss

numbers = st.floats(-3, 3, allow_subnormal=False)
logprobs = st.floats(-6, 0, allow_subnormal=False)
fractions = st.floats(0, 1, allow_subnormal=False)
many = settings(max_examples=150)


def double(rows: list) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def near(found: torch.Tensor, expected: object) -> None:
    values = found.flatten() if found.dim() else found
    assert values.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@st.composite
def responses(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]], list[list[bool]]]:
    """Rewards, values and masks [B, T] with holes anywhere; rewards on tokens of the policy alone."""
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 7))

    def table(cells: st.SearchStrategy) -> list[list]:
        return draw(
            st.lists(st.lists(cells, min_size=width, max_size=width), min_size=height, max_size=height)
        )

    mask, values, rewards = table(st.booleans()), table(numbers), table(numbers)
    kept = [[r if m else 0.0 for r, m in zip(*pair, strict=True)] for pair in zip(rewards, mask, strict=True)]
    return kept, values, mask


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Eq. 16 as it is written: A_t = sum_l (gamma lambda)^l delta_{t+l}."""
    ahead = [*values, 0.0][1:]
    deltas = [r + gamma * v_next - v for r, v_next, v in zip(rewards, ahead, values, strict=True)]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))
    ]


def spread(tokens: list[float], mask: list[bool]) -> list[float]:
    """The tokens of one row back on their positions, 0 elsewhere."""
    left = iter(tokens)
    return [next(left) if m else 0.0 for m in mask]


def only(row: list[float], mask: list[bool]) -> list[float]:
    return [x for x, m in zip(row, mask, strict=True) if m]


@many
@given(responses(), fractions, fractions)
def test_gae(batch: tuple, gamma: float, lam: float) -> None:
    rewards, values, mask = batch
    advantages, returns = gae(double(rewards), double(values), torch.tensor(mask), gamma, lam)
    expected, targets = [], []
    for r, v, m in zip(rewards, values, mask, strict=True):
        tokens = slow_gae(only(r, m), only(v, m), gamma, lam)
        expected += spread(tokens, m)
        targets += spread([a + b for a, b in zip(tokens, only(v, m), strict=True)], m)
    near(advantages, expected)
    near(returns, targets)


@many
@given(responses(), fractions)
def test_discounted_returns(batch: tuple, gamma: float) -> None:
    rewards, _, mask = batch
    expected = []
    for r, m in zip(rewards, mask, strict=True):
        tokens = only(r, m)
        sums = [sum(gamma ** (s - t) * tokens[s] for s in range(t, len(tokens))) for t in range(len(tokens))]
        expected += spread(sums, m)
    near(discounted_returns(double(rewards), torch.tensor(mask), gamma), expected)


@many
@given(responses())
def test_whiten(batch: tuple) -> None:
    _, values, mask = batch
    tokens = [x for v, m in zip(values, mask, strict=True) for x in only(v, m)]
    assume(len(tokens) > 0)
    mean, variance = statistics.fmean(tokens), statistics.pvariance(tokens)
    # A variance far below its epsilon is rounding in sums of squares; whatever it is, the result must stay small.
    assume(variance > 1e-6 or variance == 0)
    expected = [
        x
        for v, m in zip(values, mask, strict=True)
        for x in spread([(y - mean) / math.sqrt(variance + 1e-8) for y in only(v, m)], m)
    ]
    found = whiten(double(values), torch.tensor(mask)).flatten().tolist()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


@many
@given(
    st.lists(st.lists(st.none() | numbers | st.just(0.1), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from(GROUP_ESTIMATORS),
    st.floats(1e-4, 1, allow_subnormal=False),
)
def test_group_advantages(groups: list[list[float | None]], estimator: str, eps: float) -> None:
    """None: a sample without a score."""
    expected, without_signal = [], 0
    for group in groups:
        scores = [score for score in group if score is not None]
        silent = len(set(scores)) < 2
        without_signal += silent
        for score in group:
            if score is None or silent:
                expected.append(0.0)
            elif estimator == "rloo":
                expected.append(score - (sum(scores) - score) / (len(scores) - 1))
            elif estimator == "grpo":
                expected.append((score - statistics.fmean(scores)) / (statistics.stdev(scores) + eps))
            else:
                expected.append(score - statistics.fmean(scores))
    filled = [math.nan if score is None else score for group in groups for score in group]
    valid = [score is not None for group in groups for score in group]
    found, silent_groups = group_advantages(double(filled), 3, estimator, eps, torch.tensor(valid))
    near(found, expected)
    assert silent_groups == without_signal


@many
@given(st.lists(st.tuples(logprobs, logprobs, st.booleans()), min_size=1, max_size=9))
def test_kl(tokens: list[tuple[float, float, bool]]) -> None:
    p, q, mask = zip(*tokens, strict=True)
    formulas = {
        "k1": lambda a, b: a - b,
        "k2": lambda a, b: (a - b) ** 2 / 2,
        "k3": lambda a, b: math.exp(b) / math.exp(a) - 1 + a - b,
    }
    sums = kl_sums(double(p), double(q), torch.tensor(mask))
    assert sums["tokens"] == sum(mask)
    for name in ESTIMATORS:
        expected = [formulas[name](a, b) for a, b in zip(p, q, strict=True)]
        near(kl(double(p), double(q), name), expected)
        near(sums[name], sum(only(expected, list(mask))))
    # k2 and k3 of tokens are never negative, but for the last digit.
    assert kl(double(p), double(q), "k3").min() > -1e-15


def slow_surrogate(
    now: float, old: float, advantage: float, low: float, high: float, dual: float | None
) -> tuple[float, float, bool]:
    """One token: its objective, its slope in the log-probability, and whether the clip lowered it."""
    ratio = math.exp(now) / math.exp(old)
    if advantage >= 0:
        clipped = ratio > 1 + high and advantage > 0
        objective = advantage * min(ratio, 1 + high)
        slope = 0.0 if clipped else advantage * ratio
        return objective, slope, clipped
    clipped = ratio < 1 - low
    objective = advantage * max(ratio, 1 - low)
    slope = 0.0 if clipped else advantage * ratio
    if dual is not None and objective < dual * advantage:
        objective, slope = dual * advantage, 0.0
    return objective, slope, clipped


tokens_of_ppo = st.lists(
    st.tuples(logprobs, st.floats(-1.2, 1.2, allow_subnormal=False), numbers, fractions, st.floats(0.1, 2)),
    min_size=1,
    max_size=9,
)


@many
@given(
    tokens_of_ppo, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.none() | st.floats(1.1, 3), st.booleans()
)
def test_policy_loss(tokens: list, low: float, high: float, dual: float | None, corrected: bool) -> None:
    old, step, advantages, weights, importance = (list(column) for column in zip(*tokens, strict=True))
    now = [a + b for a, b in zip(old, step, strict=True)]
    edges = [1 - low, 1 + high, *([] if dual is None else [dual])]
    assume(all(abs(math.exp(s) - edge) > 1e-6 for s in step for edge in edges))
    loss, clipped = 0.0, 0
    slopes = []
    for n, o, a, w, i in zip(now, old, advantages, weights, importance, strict=True):
        objective, slope, lowered = slow_surrogate(n, o, a, low, high, dual)
        factor = w * (i if corrected else 1.0)
        loss -= factor * objective
        slopes.append(-factor * slope)
        clipped += lowered and w != 0
    leaf = double(now).requires_grad_()
    found, metrics = policy_loss(
        leaf,
        double(old),
        double(advantages),
        double(weights),
        low,
        high,
        dual,
        double(importance) if corrected else None,
    )
    found.backward()
    near(found.detach(), loss)
    assert leaf.grad is not None
    near(leaf.grad, slopes)
    assert metrics["clipped"] == clipped
    assert metrics["tokens"] == sum(w != 0 for w in weights)


@many
@given(
    st.lists(st.tuples(numbers, numbers, numbers, fractions), min_size=1, max_size=9),
    st.none() | st.floats(0.1, 1),
)
def test_value_loss(tokens: list, clip: float | None) -> None:
    values, old, returns, weights = (list(column) for column in zip(*tokens, strict=True))
    loss = 0.0
    for v, o, r, w in zip(values, old, returns, weights, strict=True):
        error = (v - r) ** 2
        if clip is not None:
            error = max(error, (min(max(v, o - clip), o + clip) - r) ** 2)
        loss += 0.5 * w * error
    found, metrics = value_loss(double(values), double(old), double(returns), double(weights), clip)
    near(found, loss)
    taken = [(v - r) ** 2 for v, r, w in zip(values, returns, weights, strict=True) if w != 0]
    near(metrics["squared_error"], sum(taken))


@many
@given(st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=9))
def test_explained_variance(tokens: list) -> None:
    values, returns, mask = (list(column) for column in zip(*tokens, strict=True))
    kept = only(returns, mask)
    assume(len(kept) > 0 and (statistics.pvariance(kept) > 1e-3 or len(set(kept)) == 1))
    errors = [r - v for r, v in zip(kept, only(values, mask), strict=True)]
    expected = math.nan
    if len(set(kept)) > 1:
        expected = 1 - statistics.pvariance(errors) / statistics.pvariance(kept)
    found = explained_variance(explained_variance_sums(double(values), double(returns), torch.tensor(mask)))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


@many
@given(st.lists(st.tuples(logprobs, logprobs, st.booleans()), min_size=1, max_size=9), st.floats(0.5, 3))
def test_truncated_weights(tokens: list, cap: float) -> None:
    trainer, sampler, mask = (list(column) for column in zip(*tokens, strict=True))
    expected = [
        min(math.exp(t) / math.exp(q), cap) if m else 0.0
        for t, q, m in zip(trainer, sampler, mask, strict=True)
    ]
    weights, metrics = truncated_weights(double(trainer), double(sampler), cap, torch.tensor(mask))
    near(weights, expected)
    near(metrics["weight"], sum(expected))


@many
@given(responses(), st.lists(numbers, min_size=3, max_size=3), st.floats(0, 1))
def test_token_rewards(batch: tuple, scores: list[float], coefficient: float) -> None:
    dense, penalty, mask = batch
    assume(all(any(row) for row in mask))
    expected = []
    for row, (d, k, m) in enumerate(zip(dense, penalty, mask, strict=True)):
        tokens = [-coefficient * a + b for a, b in zip(only(k, m), only(d, m), strict=True)]
        tokens[-1] += scores[row]
        expected += spread(tokens, m)
    found = token_rewards(
        double(scores[: len(mask)]), torch.tensor(mask), double(penalty), coefficient, double(dense)
    )
    near(found, expected)


@many
@given(
    st.lists(st.lists(logprobs, max_size=4), min_size=1, max_size=5).filter(any),
    st.sampled_from(masking.LOSS_MEANS),
)
def test_weighted_cross_entropy_is_the_mean_it_is_called(samples: list[list[float]], loss_mean: str) -> None:
    count, longest = len(samples), 6
    every = [x for sample in samples for x in sample]
    expected = {
        "token": -sum(every) / len(every),
        "sequence": -sum(sum(sample) / len(sample) for sample in samples if sample) / count,
        "constant": -sum(every) / (count * longest),
    }[loss_mean]
    lengths = torch.tensor([len(sample) for sample in samples])
    weights = masking.per_token(
        masking.token_weights(lengths, loss_mean, len(every), count, longest), lengths
    )
    loss, metrics = cross_entropy(double(every), weights)
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert metrics["tokens"] == len(every)
