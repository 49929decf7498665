"""The sources of a recipe's reward section, ready to score."""

from typing import Any, Protocol

from rlhfctl.recipe.sections import ModelSource, PythonSource, Reward, VerifierSource
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.python_source import PythonReward
from rlhfctl.rewards.verifiers import VerifierReward


class Source(Protocol):
    """What gives scores. Samples are {"id", "messages", "response", "label", "metadata"} dicts."""

    name: str
    weight: float

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        """One outcome a sample, in order; a sample that cannot be scored is an outcome, not an exception."""
        ...

    def close(self) -> None:
        """Ends processes and frees memory."""
        ...


def build_sources(reward: Reward) -> list[Source]:
    """In the order of the recipe, names made unique (`score`, `score#2`). Raises Refused for a missing file."""
    sources: list[Source] = []
    names: dict[str, int] = {}
    for section in reward.sources:
        source = _build(section)
        count = names[source.name] = names.get(source.name, 0) + 1
        if count > 1:
            source.name = f"{source.name}#{count}"
        sources.append(source)
    return sources


def _build(section: VerifierSource | PythonSource | ModelSource) -> Source:
    if isinstance(section, VerifierSource):
        return VerifierReward(section)
    if isinstance(section, PythonSource):
        return PythonReward(section)
    from rlhfctl.rewards.model import ModelReward  # torch

    return ModelReward(section)
