"""How much one token weighs in the loss, so that the global batch is the unit of every mean.

Every loss of this package is a weighted sum, loss = sum_i weights_i * l_i, over the tokens it is given. The weights
hold the normaliser of the whole global batch (all micro-batches of one optimizer step, all ranks), so the sum over any
split into micro-batches or ranks is the same number, and gradients add up without a correction for uneven splits.

    token      w = 1 / total_tokens                         mean over all tokens (DAPO, arXiv 2503.14476, section 3.3)
    sequence   w = 1 / (total_samples * tokens of b)        mean over samples of the mean over each sample's tokens
                                                            (GRPO, arXiv 2402.03300, eq. 3; ReFT, arXiv 2401.08967)
    constant   w = 1 / (total_samples * max_new_tokens)     sum over a constant (Dr. GRPO, arXiv 2503.20783)

Shapes: B samples, N tokens of all samples end to end, T longest response.

1. Only trained tokens count: prompt, padding and observation tokens are in neither the length nor the total.
2. A sample without trained tokens weighs nothing, but is still one of total_samples.
3. Weights are float32; a length is exact there up to 2**24 tokens.
"""

import torch
from torch import Tensor

LOSS_MEANS = ("token", "sequence", "constant")


def token_weights(
    lengths: Tensor, loss_mean: str, total_tokens: int, total_samples: int, max_new_tokens: int
) -> Tensor:
    """The weight of each token of sample b. Unit: 1 / tokens (token, constant), 1 / (samples * tokens) (sequence).

    lengths [B]: trained tokens of each sample at hand; total_tokens, total_samples: of the whole global batch, of which
    these samples may be a part; max_new_tokens: for constant alone. Returns [B], float32.
    Raises ValueError on an unknown loss_mean and on a normaliser that is not positive.
    """
    lengths = lengths.float()
    some = lengths > 0
    if loss_mean == "token":
        weights = torch.full_like(lengths, 1.0 / _positive(total_tokens, "total_tokens"))
    elif loss_mean == "sequence":
        weights = 1.0 / (_positive(total_samples, "total_samples") * lengths)
    elif loss_mean == "constant":
        normaliser = _positive(total_samples, "total_samples") * _positive(max_new_tokens, "max_new_tokens")
        weights = torch.full_like(lengths, 1.0 / normaliser)
    else:
        raise ValueError(f"loss_mean is {loss_mean!r}: one of {', '.join(LOSS_MEANS)}")
    return torch.where(some, weights, 0.0)


def per_token(per_sample: Tensor, lengths: Tensor) -> Tensor:
    """per_sample [B] repeated for each token of its sample, in order: [N], N = lengths.sum()."""
    return torch.repeat_interleave(per_sample, lengths.to(per_sample.device))


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """bool [B, width], True on the first lengths[b] positions of row b: the mask of right-padded rows."""
    return torch.arange(width, device=lengths.device)[None] < lengths[:, None]


def refuse_outside(rewards: Tensor, mask: Tensor) -> None:
    """Raises ValueError where a reward [B, T] stands outside the bool mask [B, T]: it would silently be lost."""
    lost = int(((rewards != 0) & ~mask).sum())
    if lost:
        raise ValueError(f"{lost} rewards stand outside the response mask: they would be lost")


def _positive(value: int, name: str) -> int:
    if value <= 0:
        raise ValueError(f"{name} is {value}: the global batch has nothing to average over")
    return value
