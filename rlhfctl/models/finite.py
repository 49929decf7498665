"""Whether weights are numbers: an update that overflows leaves NaN or infinity, which no loss before it shows."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rlhfctl.models.in_parts import BUCKET, buckets, gathered


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """By the largest magnitude of each, which NaN and infinity both spoil; one number is read from the device."""
    largest = [torch.linalg.vector_norm(tensor.detach(), math.inf) for tensor in tensors if tensor.numel()]
    together = [each.float().to(largest[0].device) for each in largest]
    return not together or bool(torch.stack(together).isfinite().all())


def first_non_finite(named: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The name of the first parameter that holds NaN or infinity. Where parameters are in parts (ZeRO-3) it is a
    collective, and one bucket of them is whole at a time."""
    names = {parameter: name for name, parameter in named}
    found = None
    for bucket in buckets(names, BUCKET):
        with gathered(bucket):
            if found is None and not all_finite(bucket):
                found = next(names[each] for each in bucket if not all_finite([each]))
    return found
