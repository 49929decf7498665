"""One sampled response on its way from the rollout to the loss."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhfctl.data.encode import PromptRow
from rlhfctl.rollout.types import Rollout
from rlhfctl.templates.encode import ChatEncoder


@dataclass(slots=True)
class Trajectory:
    """T response tokens, observations between the policy's turns included.

    index: place in the step's global batch; samples of one prompt are neighbours. reward: the weighted sum of the
    sources, None where one failed; shaped: what training uses; logprobs [T]: the sampler's. reward_metrics: what the
    sources say beside the score. token_rewards [T]: rewards of parts of the response before shaping, None where only
    the whole one is rewarded. unspread: of `reward` what redistribution spreads over no token, None: nothing was
    spread. observed: which response tokens the policy did not write, None: it wrote them all.
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
    token_rewards: Tensor | None = None
    unspread: float | None = None
    observed: list[bool] | None = None

    @property
    def earned(self) -> float:
        """The raw score and, with reward.granularity, the rewards of the response's steps or tokens."""
        assert self.reward is not None
        return self.reward + (float(self.token_rewards.sum()) if self.token_rewards is not None else 0.0)

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    @property
    def mask(self) -> Tensor:
        """bool [T], True on tokens that the policy wrote."""
        if self.observed is None:
            return torch.ones(len(self.response_ids), dtype=torch.bool)
        return ~torch.tensor(self.observed)

    @property
    def trained(self) -> list[int]:
        """Indices in `ids` of the tokens that the policy wrote."""
        start, observed = len(self.prompt_ids), self.observed
        return [
            start + place
            for place in range(len(self.response_ids))
            if observed is None or not observed[place]
        ]

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
