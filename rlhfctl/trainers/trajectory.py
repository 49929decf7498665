"""One sampled response on its way from the rollout to the loss."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlhfctl.data.encode import PromptRow
from rlhfctl.rollout.types import Rollout
from rlhfctl.templates.encode import ChatEncoder


@dataclass(slots=True)
class Trajectory:
    """T response tokens. index: place in the step's global batch; samples of one prompt are neighbours.

    reward: the weighted sum of the sources, None where one failed; shaped: what training uses; logprobs [T]: the
    sampler's. reward_metrics: what the sources say beside the score.
    """

    index: int
    sample_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: Tensor
    truncated: bool
    text: str
    reward: float | None = None
    shaped: float = 0.0
    reward_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    @property
    def trained(self) -> range:
        """Indices of the response tokens in `ids`."""
        return range(len(self.prompt_ids), len(self.prompt_ids) + len(self.response_ids))

    def record(self, step: int, encoder: ChatEncoder) -> dict[str, Any]:
        """For samples.jsonl."""
        return {
            "step": step,
            "index": self.index,
            "id": self.sample_id,
            "prompt": encoder.tokenizer.decode(self.prompt_ids, skip_special_tokens=False),
            "response": self.text,
            "tokens": len(self.response_ids),
            "truncated": self.truncated,
            "reward": self.reward,
            "shaped_reward": self.shaped,
            "reward_metrics": self.reward_metrics,
        }


def from_rollout(rollout: Rollout, prompt: PromptRow, encoder: ChatEncoder) -> Trajectory:
    return Trajectory(
        index=rollout.index,
        sample_id=prompt.sample.id,
        prompt_ids=rollout.prompt_ids,
        response_ids=rollout.response_ids,
        logprobs=rollout.logprobs,
        truncated=rollout.finish == "length",
        text=encoder.decode_response(rollout.response_ids),
    )
