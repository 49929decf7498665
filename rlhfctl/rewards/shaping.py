"""From the summed score of a sample to the reward that training uses. Pure functions of floats.

The order is fixed, and each step sees the result of the one before:
    1. raw          the weighted sum of the sources
    2. clip         into reward.shaping.clip
    3. truncation   samples cut by max_new_tokens: keep, replace by truncated_reward, or drop
    4. length       minus the overlong penalty (DAPO): with L = max_new_tokens and b = overlong_buffer,
                    clip((length - (L - b)) / b, 0, 1) * overlong_factor
"""

from dataclasses import dataclass, field

from rlhfctl.recipe.sections import Shaping


@dataclass(slots=True)
class Shaped:
    """rewards[i] is None where sample i has no reward: its scoring failed, or it was dropped as truncated.

    metrics: fractions over the samples that have a raw score, and the mean overlong penalty over those kept.
    """

    rewards: list[float | None]
    metrics: dict[str, float] = field(default_factory=dict)


def shape(
    scores: list[float | None],
    lengths: list[int],
    truncated: list[bool],
    shaping: Shaping,
    max_new_tokens: int,
) -> Shaped:
    """scores, lengths (response tokens, stop token included) and truncated: one entry a sample."""
    rewards: list[float | None] = []
    clipped = dropped = 0
    penalties: list[float] = []
    for score, length, cut in zip(scores, lengths, truncated, strict=True):
        if score is None:
            rewards.append(None)
            continue
        reward = clip(score, shaping.clip)
        clipped += reward != score
        if cut and shaping.truncated == "drop":
            dropped += 1
            rewards.append(None)
            continue
        if cut and shaping.truncated == "replace":
            reward = shaping.truncated_reward
        penalty = overlong_penalty(length, max_new_tokens, shaping.overlong_buffer, shaping.overlong_factor)
        penalties.append(penalty)
        rewards.append(reward - penalty)
    scored = sum(score is not None for score in scores)
    metrics = {}
    if shaping.clip is not None and scored:
        metrics["reward/clipped_fraction"] = clipped / scored
    if shaping.truncated == "drop" and scored:
        metrics["reward/dropped_fraction"] = dropped / scored
    if shaping.overlong_buffer and penalties:
        metrics["reward/overlong_penalty"] = sum(penalties) / len(penalties)
    return Shaped(rewards, metrics)


def clip(score: float, bounds: tuple[float, float] | None) -> float:
    return score if bounds is None else min(max(score, bounds[0]), bounds[1])


def overlong_penalty(length: int, max_new_tokens: int, buffer: int, factor: float) -> float:
    """0 up to max_new_tokens - buffer tokens, then linear up to `factor` at max_new_tokens."""
    if not buffer:
        return 0.0
    return min(max((length - (max_new_tokens - buffer)) / buffer, 0.0), 1.0) * factor
