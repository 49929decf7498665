"""Rewards brought to mean 0 and deviation 1: over the run so far, over the batch, or within the samples of one prompt.

    x' = (x - mean) / (std + EPS)      population deviation; 0 where all values of the reference set are equal

running: mean and std over every value since the run began, the batch at hand included. Batches are merged by their
count, mean and sum of squared deviations (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances", 1979), in the order of the global batch: every rank comes to the same numbers, and the
three go into the checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

EPS = 1e-8


@dataclass(slots=True)
class Running:
    """squares: the sum of (value - mean)^2."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Sequence[float]) -> None:
        if not values:
            return
        count, mean = len(values), sum(values) / len(values)
        squares = sum((value - mean) ** 2 for value in values)
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def std(self) -> float:
        return (max(self.squares, 0.0) / self.count) ** 0.5 if self.count else 0.0


def normalise(
    values: Sequence[float | None], groups: Sequence[int], over: str, running: Running
) -> list[float | None]:
    """values: one a sample, None where there is none, which stays None and takes no part. groups: the prompt of each.

    over: running (adds the values to `running` first), batch, group, or none. A group of one value gives 0.
    """
    if over == "none":
        return list(values)
    present = [value for value in values if value is not None]
    if over == "running":
        running.add(present)
        equal = running.squares == 0.0
        return [
            None if value is None else scaled(value, running.mean, running.std, equal) for value in values
        ]
    if over == "batch":
        return within(values)
    found: list[float | None] = [None] * len(values)
    for group in dict.fromkeys(groups):
        places = [place for place, each in enumerate(groups) if each == group]
        for place, value in zip(places, within([values[place] for place in places]), strict=True):
            found[place] = value
    return found


def within(values: Sequence[float | None]) -> list[float | None]:
    """Against the values themselves; equal values are exactly 0, whatever their sum rounds to."""
    present = [value for value in values if value is not None]
    own = Running()
    own.add(present)
    equal = len(set(present)) <= 1
    return [None if value is None else scaled(value, own.mean, own.std, equal) for value in values]


def scaled(value: float, mean: float, std: float, equal: bool) -> float:
    return 0.0 if equal else (value - mean) / (std + EPS)
