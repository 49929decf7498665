"""The best of n whole responses by V + alpha * log pi, or by a reward model's score."""

from collections.abc import Sequence


def best_of(values: Sequence[float], logprobs: Sequence[float], alpha: float) -> int:
    """Place of the highest score; of equal ones the first."""
    scores = [value + alpha * logprob for value, logprob in zip(values, logprobs, strict=True)]
    return max(range(len(scores)), key=lambda place: scores[place])
