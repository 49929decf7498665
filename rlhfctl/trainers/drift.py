"""Signs that a policy games its reward, read from means over the last few steps.

The reward of training rises (`reward/raw`; with rewards of steps or tokens `reward/earned`), and at the same time one
of these:

    verifier    a held-out measure falls: what verifiers call correct, a source of weight 0, accuracy on data.eval
    format      the verifier's answers became readable, and no more of them are right
    length      responses became `length_ratio` times longer or shorter, or half of them more are cut
    kl          kl/reference is above `kl_nats`

Beside them, whatever the reward does: entropy below `entropy_ratio` times its start.

Rise and fall of a mean are against its spread: d = |now - then| counts where

    d > change * std(then)   and   d > 4 * sqrt(var(then) / n(then) + var(now) / n(now))

`now` is the trailing window (fewer steps at the start), `then` for a held-out measure the window in which it was best
(mean - 2 standard errors), else the first step. Population variances over samples. Floats and dicts only: the state
goes through JSON into the checkpoint and back unchanged.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhfctl.recipe.guard import Guard

STANDARD_ERRORS = 4.0
CUT_MORE = 0.5  # of all responses, since the start
REWARD, READABLE, CORRECT = "reward/raw", "reward/parsable", "reward/correct"
EARNED = "reward/earned"  # with the rewards of steps or tokens
LENGTH, CUT, KL, ENTROPY = "length/response", "length/truncated_fraction", "kl/reference", "entropy"


@dataclass(frozen=True, slots=True)
class Stat:
    """Mean and population variance of n samples; n 0: of a number that has no samples of its own."""

    n: float
    mean: float
    var: float

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.var / self.n) if self.n else 0.0


def of_values(values: Iterable[float]) -> Stat:
    found = list(values)
    mean = sum(found) / len(found)
    return Stat(float(len(found)), mean, sum((value - mean) ** 2 for value in found) / len(found))


def merged(stats: list[Stat]) -> Stat:
    """Of all samples together; of numbers without samples the plain mean."""
    n = sum(stat.n for stat in stats)
    if not n:
        return Stat(0.0, sum(stat.mean for stat in stats) / len(stats), 0.0)
    mean = sum(stat.n * stat.mean for stat in stats) / n
    return Stat(n, mean, sum(stat.n * (stat.var + (stat.mean - mean) ** 2) for stat in stats) / n)


def rose(then: Stat, now: Stat, change: float) -> bool:
    """Whether the mean went up by more than chance and more than `change` deviations."""
    error = math.hypot(then.error, now.error)
    return now.mean - then.mean > max(change * math.sqrt(then.var), STANDARD_ERRORS * error)


def fell(then: Stat, now: Stat, change: float) -> bool:
    return rose(now=Stat(now.n, -now.mean, now.var), then=Stat(then.n, -then.mean, then.var), change=change)


@dataclass(frozen=True, slots=True)
class Sign:
    """kind: a key of `guard`. evidence: the numbers then and now. good_step: the last step without the sign."""

    kind: str
    evidence: str
    good_step: int


@dataclass(slots=True)
class Best:
    """The best window of a held-out measure, and the reward of that time (None until the first step)."""

    step: int
    stat: Stat
    reward: Stat | None


@dataclass(slots=True)
class Drift:
    """One per run; every rank holds the same. reward: the number that training raises."""

    guard: Guard
    reward: str = REWARD
    recent: list[dict[str, Stat]] = field(default_factory=list)
    first: dict[str, Stat] = field(default_factory=dict)
    first_step: int = 0
    best: dict[str, Best] = field(default_factory=dict)
    quiet: dict[str, int] = field(default_factory=dict)  # sign -> the last step without it

    def state(self) -> dict[str, Any]:
        return {
            name: _plain(getattr(self, name)) for name in ("recent", "first", "first_step", "best", "quiet")
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.recent = [_stats(each) for each in state["recent"]]
        self.first, self.first_step = _stats(state["first"]), state["first_step"]
        self.best = {
            name: Best(each["step"], Stat(**each["stat"]), Stat(**each["reward"]) if each["reward"] else None)
            for name, each in state["best"].items()
        }
        self.quiet = dict(state["quiet"])

    def evaluated(self, step: int, name: str, stat: Stat) -> list[Sign]:
        """A held-out measure of its own samples, as an evaluation gives it."""
        reward = self._now(self.reward)
        return self._held_out(step, name, stat, reward)

    def look(self, step: int, found: dict[str, Stat], held_out: Iterable[str]) -> list[Sign]:
        """The signs after step `step`. found: its numbers; held_out: which of them must not fall."""
        if not self.first:
            self.first, self.first_step = found, step
            for best in self.best.values():
                best.reward = found[self.reward]
        self.recent = [*self.recent, found][-self.guard.window :]
        reward = self._now(self.reward)
        assert reward is not None
        signs = [
            sign
            for name in held_out
            if (now := self._now(name)) is not None
            for sign in self._held_out(step, name, now, reward)
        ]
        for kind, names in self._drifted(rose(self.first[self.reward], reward, self.guard.change)).items():
            if not names:
                self.quiet[kind] = step
                continue
            shown = " and ".join(self._since_start(name) for name in names)
            signs.append(Sign(kind, f"{shown} since step {self.first_step}", self.quiet.get(kind, 0)))
        return signs

    def _held_out(self, step: int, name: str, now: Stat, reward: Stat | None) -> list[Sign]:
        best = self.best.get(name)
        if best is None or now.mean - 2 * now.error >= best.stat.mean - 2 * best.stat.error:
            self.best[name] = Best(step, now, reward)
            return []
        if reward is None or best.reward is None:
            return []
        change = self.guard.change
        if not fell(best.stat, now, change) or not rose(best.reward, reward, change):
            return []
        numbers = f"{_arrow(self.reward, best.reward, reward)} while {_arrow(name, best.stat, now)}"
        return [Sign("verifier", f"{numbers} since step {best.step}", best.step)]

    def _drifted(self, rising: bool) -> dict[str, list[str]]:
        """Sign -> the numbers that show it, [] where it is not there."""
        guard, start = self.guard, self.first
        found: dict[str, list[str]] = {"format": [], "length": [], "kl": [], "entropy": []}
        readable, correct = self._now(READABLE), self._now(CORRECT)
        if rising and readable and correct and READABLE in start and CORRECT in start:
            more_right = correct.mean > start[CORRECT].mean + 2 * math.hypot(
                correct.error, start[CORRECT].error
            )
            if rose(start[READABLE], readable, guard.change) and not more_right:
                found["format"] = [self.reward, READABLE, CORRECT]
        length, cut, kl, entropy = (self._now(name) for name in (LENGTH, CUT, KL, ENTROPY))
        if rising and length and start[LENGTH].mean:
            ratio = length.mean / start[LENGTH].mean
            if not 1 / guard.length_ratio < ratio < guard.length_ratio:
                found["length"] = [self.reward, LENGTH]
        if rising and cut and cut.mean - start[CUT].mean >= CUT_MORE:
            found["length"] = [self.reward, LENGTH, CUT]
        if rising and kl and kl.mean > guard.kl_nats:
            found["kl"] = [self.reward, KL]
        if entropy and entropy.mean < guard.entropy_ratio * start[ENTROPY].mean:
            found["entropy"] = [ENTROPY]
        return found

    def _now(self, name: str) -> Stat | None:
        stats = [each[name] for each in self.recent if name in each]
        return merged(stats) if stats else None

    def _since_start(self, name: str) -> str:
        now = self._now(name)
        assert now is not None
        return _arrow(name, self.first[name], now)


def _arrow(name: str, then: Stat, now: Stat) -> str:
    return f"{name} {then.mean:.3g} -> {now.mean:.3g}"


def _stats(plain: dict[str, Any]) -> dict[str, Stat]:
    return {name: Stat(**each) for name, each in plain.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Stat | Best):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
