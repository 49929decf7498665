"""Scores of character spans as rewards of the tokens that wrote those characters.

    step     the whole score on the last token of the span: the step ends there, and is judged there
    spread   score / k on each of the k tokens that share a character with the span

Shapes: T tokens of one response, S spans. Units: reward.

1. Offsets [T, 2] are characters [start, end) of the decoded response. A token without characters of its own (a stop
   token, all but the last token of a character in several) has start = end.
2. The last token of a span is the one that completes its last character; a span without characters (an empty step)
   belongs to the token before it, the first one where there is none.
3. No score is lost: the sum over tokens is the sum over spans. A span that ends past the text belongs to the last token
   with characters.
4. Tokens outside the mask (observations) take nothing: what falls on one goes to the last policy token before it, or to
   the first one where there is none before.
"""

import torch
from torch import Tensor


def spans_to_tokens(offsets: Tensor, spans: Tensor, scores: Tensor, mask: Tensor, spread: bool) -> Tensor:
    """Rewards [T] in the dtype of scores, 0 outside the mask.

    offsets [T, 2] and spans [S, 2] integers; scores [S]; mask [T]. Raises ValueError where no token is the policy's.
    """
    mask = mask.bool()
    if not bool(mask.any()):
        raise ValueError("a response has no token of the policy: its span scores have no place")
    rewards = torch.zeros(len(offsets), dtype=scores.dtype)
    some = offsets[:, 1] > offsets[:, 0]
    for (start, end), score in zip(spans.tolist(), scores, strict=True):
        shared = some & (offsets[:, 0] < end) & (offsets[:, 1] > start)
        places = _last_token(offsets, some, end)
        if spread and bool(shared.any()):
            places = shared.nonzero().flatten()
        for place in places.tolist():
            rewards[_policy_token(place, mask)] += score / len(places)
    return rewards


def _last_token(offsets: Tensor, some: Tensor, end: int) -> Tensor:
    """[1]: the token that holds character end - 1; of several candidates the last that begins before `end`."""
    begun = (some & (offsets[:, 0] < end)).nonzero().flatten()
    return begun[-1:] if len(begun) else torch.zeros(1, dtype=torch.long)


def _policy_token(place: int, mask: Tensor) -> int:
    mine = mask.nonzero().flatten()
    before = mine[mine <= place]
    return int(before[-1] if len(before) else mine[0])
