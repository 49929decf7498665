"""A response of several turns: what the policy wrote and what it was shown in between, as lists of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Segment:
    """logprobs [len(ids)]: the sampler's, of tokens that the policy wrote; None for an observation (a tool's answer, a
    user's turn), which is context for what follows and never trained on."""

    ids: list[int]
    logprobs: Tensor | None = None


def join(segments: Sequence[Segment]) -> tuple[list[int], Tensor, list[bool]]:
    """ids, logprobs and mask of the whole response; logprobs are 0 and the mask False on observations.

    Raises ValueError where log-probabilities and ids differ in number, or the policy wrote nothing."""
    ids: list[int] = []
    logprobs: list[Tensor] = []
    mask: list[bool] = []
    for segment in segments:
        mine = segment.logprobs is not None
        found = segment.logprobs if segment.logprobs is not None else torch.zeros(len(segment.ids))
        if len(found) != len(segment.ids):
            raise ValueError(f"{len(found)} log-probabilities for {len(segment.ids)} tokens")
        ids += segment.ids
        logprobs.append(found)
        mask += [mine] * len(segment.ids)
    if not any(mask):
        raise ValueError("a response without a token of the policy")
    return ids, torch.cat(logprobs), mask
