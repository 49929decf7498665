"""What a rollout engine is asked for and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlhfctl.errors import RunFailed
from rlhfctl.rollout.delimiters import Delimiters


class EngineLost(RunFailed):
    """The engine is gone in the middle of a rollout: nothing of it was used, and the policy is as it was before."""


@dataclass(slots=True)
class Request:
    """index: position of this sample in the step's global batch; its random numbers depend on nothing else. most: new
    tokens that are of use, where these are fewer than max_new_tokens; an engine may write more."""

    index: int
    prompt_ids: list[int]
    most: int | None = None

    def room(self, max_new_tokens: int) -> int:
        return max_new_tokens if self.most is None else min(self.most, max_new_tokens)


@dataclass(slots=True)
class Rollout:
    """The token ids that were sampled are the ids that are trained on.

    response_ids: stop token included when finish is "stop"; logprobs [T]: float32 log-probabilities in nats of those
    ids under the sampling distribution (logits / temperature).
    """

    index: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: Tensor
    finish: Literal["stop", "length", "delimiter"]


@dataclass(slots=True)
class Sampling:
    """temperature 0 is greedy. seed and step select the random numbers. delimiters: a response also ends with the token
    that completes one (finish "delimiter")."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    seed: int
    step: int
    max_batch_tokens: int
    delimiters: Delimiters | None = None


def refuse_too_long(requests: Sequence[Request], sampling: Sampling, longest: int) -> None:
    """Raises RunFailed where a prompt and what may be written behind it pass the engine's length."""
    for request in requests:
        prompt, new = len(request.prompt_ids), request.room(sampling.max_new_tokens)
        if prompt + new > longest:
            raise RunFailed(
                f"a prompt of {prompt} tokens and {new} new ones pass the engine's {longest}: "
                "set rollout.max_prompt_length"
            )
