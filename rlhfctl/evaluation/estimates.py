"""Estimators with their intervals: standard library only, numbers in, numbers out.

Intervals are 95 % (z = 1.96). A share of prompts gets Wilson's score interval (1927), which stays inside [0, 1] and
does not vanish at 0 or 1; a mean of numbers that prompts have gets the normal one; what is computed from all prompts
together (AUC, calibration, ratios) gets a bootstrap over prompts, because the answers to one prompt are not
independent.
"""

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

Z = 1.959963984540054
RESAMPLES = 200
BINS = 10

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Estimate:
    """value with its 95 % interval [low, high]; n: prompts that it rests on; standard_error: None for wilson."""

    value: float
    low: float
    high: float
    n: int
    interval: Literal["wilson", "normal", "bootstrap"]
    standard_error: float | None = None


def proportion(hits: Sequence[bool]) -> Estimate | None:
    """Share of True; centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)."""
    n = len(hits)
    if n == 0:
        return None
    p = sum(hits) / n
    scale = 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / scale
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / scale
    # At 0 and 1 the bound is the share itself; rounding must not leave it out.
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n, "wilson")


def mean(values: Sequence[float]) -> Estimate | None:
    """The mean, with the standard error of the unbiased variance (none, and an infinite interval, from one value)."""
    n = len(values)
    if n == 0:
        return None
    centre = sum(values) / n
    if n == 1:
        return Estimate(centre, -math.inf, math.inf, 1, "normal")
    error = math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1) / n)
    return Estimate(centre, centre - Z * error, centre + Z * error, n, "normal", error)


def mean_share(shares: Sequence[float]) -> Estimate | None:
    """As mean, of numbers in [0, 1], which the interval does not leave."""
    found = mean(shares)
    return None if found is None else replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def pass_at_k(n: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one.

    Unbiased where 1 - (1 - c/n)^k is not (Chen et al. 2021, arXiv 2107.03374, eq. 1). Needs 1 <= k <= n.
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass@{k} of {n} samples with {right} right is not defined")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; of equally frequent ones the one that came first. None (no answer could be read) has no
    vote."""
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    return max(votes, key=lambda answer: votes[answer]) if votes else None


def auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Probability that a right one scores above a wrong one, a tie counted half; None where one kind is missing."""
    positives = sorted(score for score, hit in zip(scores, right, strict=True) if hit)
    negatives = sorted(score for score, hit in zip(scores, right, strict=True) if not hit)
    if not positives or not negatives:
        return None
    above = tied = 0
    for score in positives:
        upto = bisect_right(negatives, score)
        ties = upto - bisect_left(negatives, score)
        above += upto - ties
        tied += ties
    return (above + 0.5 * tied) / (len(positives) * len(negatives))


def calibration_error(probabilities: Sequence[float], right: Sequence[bool]) -> float | None:
    """Expected calibration error over BINS equal bins of [0, 1]: sum of n_b / n |share right - mean probability|."""
    if not probabilities:
        return None
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, hit in zip(probabilities, right, strict=True):
        bins.setdefault(min(BINS - 1, int(probability * BINS)), []).append((probability, hit))
    gaps = (abs(sum(hit - probability for probability, hit in held)) for held in bins.values())
    return sum(gaps) / len(probabilities)


def bootstrap(
    items: Sequence[Item], statistic: Callable[[list[Item]], float | None], seed: int
) -> Estimate | None:
    """A statistic of whole prompts, with the 2.5 and 97.5 percentiles of RESAMPLES resamples of them."""
    found = statistic(list(items))
    if found is None:
        return None
    rng = random.Random(f"bootstrap {seed}")
    drawn = (statistic(rng.choices(items, k=len(items))) for _ in range(RESAMPLES))
    values = sorted(value for value in drawn if value is not None)
    low, high = values[int(0.025 * len(values))], values[math.ceil(0.975 * len(values)) - 1]
    return Estimate(found, min(low, found), max(high, found), len(items), "bootstrap")


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate | None:
    """sum / sum, with the delta method's error: residuals e_i = a_i - R b_i, error sd(e) / (mean(b) sqrt(n))."""
    n, total = len(numerators), sum(denominators)
    if n == 0 or total == 0:
        return None
    value = sum(numerators) / total
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1, "normal")
    residuals = [a - value * b for a, b in zip(numerators, denominators, strict=True)]
    error = math.sqrt(sum(e * e for e in residuals) / (n - 1) / n) / (total / n)
    return Estimate(value, value - Z * error, value + Z * error, n, "normal", error)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """Mean of the differences prompt by prompt; its error is smaller than that of two separate means, because easy and
    hard prompts are the same on both sides."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])
