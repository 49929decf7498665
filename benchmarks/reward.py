"""The reward of the benchmark runs: cheap, varied, and a function of the response alone."""

from typing import Any


def score(samples: list[dict[str, Any]]) -> list[float]:
    return [len(set(sample["response"])) / 50 for sample in samples]
