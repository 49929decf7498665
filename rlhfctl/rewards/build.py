"""The sources of a recipe's reward section, ready to score."""

from typing import Any, Protocol

from rlhfctl.errors import Unable
from rlhfctl.install import install_line
from rlhfctl.recipe.sections import ModelSource, PythonSource, RemoteSource, Reward, Template, VerifierSource
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.python_source import PythonReward
from rlhfctl.rewards.verifiers import VerifierReward
from rlhfctl.templates.encode import ChatEncoder


class Source(Protocol):
    """What gives scores. Samples are {"id", "messages", "response", "label", "metadata"} dicts."""

    name: str
    weight: float
    span_weight: float

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        """One outcome a sample, in order; a sample that cannot be scored is an outcome, not an exception."""
        ...

    def close(self) -> None:
        """Ends processes and frees memory."""
        ...


def build_sources(
    reward: Reward, policy: ChatEncoder | None = None, template: Template | None = None
) -> list[Source]:
    """In the order of the recipe, names made unique (`score`, `score#2`). Raises Refused for a missing file.

    policy, template: the policy's encoder and the recipe's section, for the bridge to a reward model."""
    sources: list[Source] = []
    names: dict[str, int] = {}
    for section in reward.sources:
        source = _build(section, policy, template, reward)
        count = names[source.name] = names.get(source.name, 0) + 1
        if count > 1:
            source.name = f"{source.name}#{count}"
        sources.append(source)
    return sources


def _build(
    section: VerifierSource | PythonSource | ModelSource | RemoteSource,
    policy: ChatEncoder | None,
    template: Template | None,
    reward: Reward,
) -> Source:
    if isinstance(section, VerifierSource):
        return VerifierReward(section)
    if isinstance(section, PythonSource):
        return PythonReward(section)
    if isinstance(section, RemoteSource):
        try:
            from rlhfctl.rewards.remote import RemoteReward
            from rlhfctl.rewards.remote_openrlhf import OpenRlhfReward
        except ModuleNotFoundError as error:
            raise Unable(f"a reward of kind remote needs {error.name}: {install_line('train')}") from None
        if section.protocol == "openrlhf":
            return OpenRlhfReward(section, reward, policy)
        return RemoteReward(section, policy, template, reward.granularity)
    from rlhfctl.rewards.model import ModelReward  # torch

    spread = reward.shaping.redistribution
    return ModelReward(section, policy, template, reward.granularity, spread)
