"""One score of a response spread over its tokens, with the total kept.

    difference   g_t = RM(x, y_<=t) - RM(x, y_<t)        RED, arXiv 2411.08302: one causal forward pass, the model
                                                         read at every token; sums to RM(x, y) - RM(x)
    attention    g_t = alpha_t * RM(x, y)                ABC, arXiv 2402.00782: alpha_t, what the scored token attends
                                                         to in the last layer, mean over heads, over the response 1
    r_t = share * g_t + 1[t = last] * (score - share * sum_t g_t)        the total kept
    r_t = share * g_t + 1[t = last] * ((1 - share) * score + share * rest)       the total not kept

Shapes: B samples, T response tokens, mask [B, T]. Units: reward.

1. The score is the shaped one: clipped, normalised, with its length and truncation terms. What shaping did to it is in
   the last token's remainder, and so is RM(x), which no token of the response earned.
2. The remainder stands on the last masked token, where the whole score stands without redistribution.
3. With the total kept, share 0 is no redistribution, and the sum over tokens is the score for every share.
4. rest is what was not spread: the scores of other sources, in the units of g_t; the whole score where there is no g_t.
"""

from torch import Tensor

from rlhfctl.algorithms.masking import refuse_outside


def differences(values: Tensor) -> Tensor:
    """[T] from the reward model's values [T + 1] at the last prompt token and at each response token."""
    return values[1:] - values[:-1]


def attended(weights: Tensor, score: float) -> Tensor:
    """[T] with the sum `score`, from the scored token's attention to the response tokens [H, T]; not all zero."""
    mean = weights.mean(0)
    return score * mean / mean.sum()


def redistribute(
    token_scores: Tensor, scores: Tensor, rest: Tensor, mask: Tensor, share: float, preserve_total: bool
) -> tuple[Tensor, Tensor]:
    """(token rewards [B, T], what is left for the last token [B]).

    token_scores [B, T]; scores, rest [B]. Raises ValueError on a token score outside the mask.
    """
    mask = mask.bool()
    refuse_outside(token_scores, mask)
    given = share * token_scores
    left = scores - given.sum(1) if preserve_total else (1.0 - share) * scores + share * rest
    return given, left
