"""Parameters that DeepSpeed keeps in parts (ZeRO-3): which ones, how large they are, and how some of them become whole.

A rank holds its part; `parameter` itself is empty until it is gathered, which is a collective.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

BUCKET = 50_000_000  # elements that are gathered at a time, where nothing else is said


def in_parts(parameter: Any) -> bool:
    """Whether it is not whole here and now."""
    return hasattr(parameter, "ds_status") and parameter.ds_status.name == "NOT_AVAILABLE"


def shape_of(parameter: Any) -> torch.Size:
    """Of the whole parameter."""
    return torch.Size(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.shape


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside they are whole on every rank. A collective where one of them is in parts: all ranks enter and leave."""
    parts = [parameter for parameter in parameters if in_parts(parameter)]
    if not parts:
        return nullcontext()
    import deepspeed

    found: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parts)
    return found


def buckets(parameters: Iterable[Any], elements: int) -> Iterator[list[Any]]:
    """Parameters that one collective gathers: at most `elements` together, a larger one alone."""
    bucket: list[Any] = []
    size = 0
    for parameter in parameters:
        count = shape_of(parameter).numel()
        if bucket and size + count > elements:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += count
    if bucket:
        yield bucket
