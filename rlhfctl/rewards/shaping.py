"""From the summed score of a sample to the reward that training uses. Pure functions of floats.

The order is fixed, and each step sees the result of the one before:
    1. raw          the weighted sum of the sources
    2. clip         into reward.shaping.clip
    3. normalise    reward.shaping.normalisation: over the run, the batch, or the samples of a prompt (normalise.py)
    4. truncation   samples cut by max_new_tokens: keep, replace by truncated_reward, or drop
    5. length       minus length_penalty * length / L, with L = max_new_tokens, and minus the overlong penalty (DAPO):
                    with b = overlong_buffer, clip((length - (L - b)) / b, 0, 1) * overlong_factor
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhfctl.recipe.sections import Shaping
from rlhfctl.rewards.normalise import Running, normalise


@dataclass(slots=True)
class Shaped:
    """rewards[i] is None where sample i has no reward: its scoring failed, or it was dropped as truncated.

    metrics: fractions over the samples that have a raw score, means of the stages that are on, and the mean penalties
    over those kept.
    """

    rewards: list[float | None]
    metrics: dict[str, float] = field(default_factory=dict)


def shape(
    scores: list[float | None],
    lengths: list[int],
    truncated: list[bool],
    shaping: Shaping,
    max_new_tokens: int,
    groups: Sequence[int] = (),
    running: Running | None = None,
) -> Shaped:
    """scores, lengths (response tokens, stop token included), truncated, groups (the prompt of each; needed for
    `normalisation: group`): one entry a sample. running: changed in place by `normalisation: running`."""
    bounded = [None if score is None else clip(score, shaping.clip) for score in scores]
    clipped = sum(before != after for before, after in zip(scores, bounded, strict=True))
    normal = normalise(bounded, groups or range(len(scores)), shaping.normalisation, running or Running())
    rewards: list[float | None] = []
    dropped = 0
    penalties: list[float] = []
    linear: list[float] = []
    for reward, length, cut in zip(normal, lengths, truncated, strict=True):
        if reward is None:
            rewards.append(None)
            continue
        if cut and shaping.truncated == "drop":
            dropped += 1
            rewards.append(None)
            continue
        if cut and shaping.truncated == "replace":
            reward = shaping.truncated_reward
        penalty = overlong_penalty(length, max_new_tokens, shaping.overlong_buffer, shaping.overlong_factor)
        penalties.append(penalty)
        linear.append(shaping.length_penalty * length / max_new_tokens)
        rewards.append(reward - penalty - linear[-1])
    scored = sum(score is not None for score in scores)
    metrics = {}
    if shaping.clip is not None and scored:
        metrics["reward/clipped_fraction"] = clipped / scored
        metrics["reward/clipped"] = mean(bounded)
    if shaping.normalisation != "none" and scored:
        metrics["reward/normalised"] = mean(normal)
        if shaping.normalisation == "running" and running is not None:
            metrics["reward/running_mean"], metrics["reward/running_std"] = running.mean, running.std
    if shaping.truncated == "drop" and scored:
        metrics["reward/dropped_fraction"] = dropped / scored
    if shaping.overlong_buffer and penalties:
        metrics["reward/overlong_penalty"] = sum(penalties) / len(penalties)
    if shaping.length_penalty and linear:
        metrics["reward/length_penalty"] = sum(linear) / len(linear)
    return Shaped(rewards, metrics)


def mean(values: Sequence[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present)


def clip(score: float, bounds: tuple[float, float] | None) -> float:
    return score if bounds is None else min(max(score, bounds[0]), bounds[1])


def overlong_penalty(length: int, max_new_tokens: int, buffer: int, factor: float) -> float:
    """0 up to max_new_tokens - buffer tokens, then linear up to `factor` at max_new_tokens."""
    if not buffer:
        return 0.0
    return min(max((length - (max_new_tokens - buffer)) / buffer, 0.0), 1.0) * factor
