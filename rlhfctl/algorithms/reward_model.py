"""Losses of reward models: pairs (Bradley-Terry), right-or-wrong answers and steps, and scores that are sums of tokens.

    pairwise   loss = sum_i w_i * ( -log sigmoid(c_i - r_i - m_i) + center * (c_i + r_i)^2 )
    binary     loss = sum_i w_i * ( -y_i log sigmoid(s_i) - (1 - y_i) log(1 - sigmoid(s_i)) )
    token sum  s(x, y) = sum_t q_t over the response's tokens; step k: the same sum over the step's tokens

Papers: pairwise InstructGPT arXiv 2203.02155 eq. 1, with the margin of Llama 2 arXiv 2307.09288 eq. 2; centering arXiv
2312.09244 section 2; binary for outcomes arXiv 2110.14168 and for the ends of steps arXiv 2305.20050; token sums in the
sequence loss with step labels beside it: L = L_sequence + c * L_step, each over what has its label.
Shapes: N pairs, answers or steps; T tokens. Units: scores are log-odds; losses are in nats.

1. -log sigmoid(d) is softplus(-d): a gap of 1,000 gives 1,000 or 0, never an overflow.
2. Weights hold the normaliser of the global batch (1 / pairs, 1 / answers, 1 / labelled steps), so that splits into
   micro-batches and ranks add up. Positions of weight 0 take no part, whatever stands there.
3. The margin is inside the loss alone: accuracy and gap are of the scores themselves. A tie is half right.
4. Targets may be probabilities (soft labels of Monte-Carlo steps).
5. A Bradley-Terry score has no zero of its own; centering gives it one without moving the differences.
6. Calibration is of confidences: of the pairs called with 80 %, 80 % should be right.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor, weights: Tensor, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, a sum over the pairs at hand, and sums over pairs of non-zero weight: pairs, correct, gap.

    chosen, rejected, margins, weights: [N]; margins 0 where the data has none. Raises ValueError on a negative margin.
    """
    taken = weights != 0
    if bool((margins[taken] < 0).any()):
        raise ValueError("a margin is negative: the rejected answer would be the better one")
    chosen, rejected = torch.where(taken, chosen, 0.0), torch.where(taken, rejected, 0.0)
    gap = chosen - rejected
    per_pair = softplus(torch.where(taken, margins, 0.0) - gap)
    if center_coef:
        per_pair = per_pair + center_coef * (chosen + rejected).square()
    with torch.no_grad():
        correct = (gap > 0).double() + 0.5 * (gap == 0)
        metrics = {"pairs": taken.sum(), "correct": (correct * taken).sum(), "gap": gap.sum()}
    return (weights * per_pair).sum(), metrics


def binary_loss(scores: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of sigmoid(scores) against targets in [0, 1]; sums over non-zero weights: count, correct.

    scores, targets, weights: [N]. A target counts as good above one half. Raises ValueError on one outside [0, 1].
    """
    taken = weights != 0
    if bool(((targets[taken] < 0) | (targets[taken] > 1)).any()):
        raise ValueError("a target is not a probability")
    scores, targets = torch.where(taken, scores, 0.0), torch.where(taken, targets, 0.0)
    per_item = softplus(scores) - targets * scores
    with torch.no_grad():
        correct = ((scores > 0) == (targets > 0.5)).double() * taken
        metrics = {"count": taken.sum(), "correct": correct.sum()}
    return (weights * per_item).sum(), metrics


def segment_sums(token_scores: Tensor, segments: Tensor, count: int) -> Tensor:
    """Scores of sequences or steps from their tokens: [T] and each token's segment [T] (-1: none) -> [count]."""
    chosen = segments >= 0
    empty = token_scores.new_zeros(count)
    return empty.index_add(0, segments[chosen], token_scores[chosen])


def calibration_error(confidences: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean over items of |mean confidence - share correct| of their bin; NaN without items.

    confidences, correct: [N] in [0, 1]; bins of equal width over [0, 1]. arXiv 1706.04599 eq. 3.
    """
    if not len(confidences):
        return float("nan")
    place = (confidences.double() * bins).long().clamp(max=bins - 1)
    gaps = segment_sums(confidences.double() - correct.double(), place, bins)
    return float(gaps.abs().sum()) / len(confidences)


def area_under_curve(scores: Tensor, good: Tensor) -> float:
    """Probability that a good item scores above a bad one, ties half; NaN where all are good or all bad.

    scores [N]; good [N] bool.
    """
    positives, negatives = scores[good].double(), scores[~good].double()
    if not len(positives) or not len(negatives):
        return float("nan")
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    upto = torch.searchsorted(ordered, positives, right=True)
    return float((below + upto).double().sum()) / (2 * len(positives) * len(negatives))
