"""The few collectives the trainers use. With one process every function is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhfctl.heartbeat import heartbeat


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Element-wise sum of a dictionary that has the same keys on every rank; in float64."""
    if not active():
        return values
    names = sorted(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    with heartbeat.waiting("sums"):
        dist.all_reduce(tensor)
        summed = tensor.tolist()
    return dict(zip(names, summed, strict=True))


def gather_lists(items: list[Any]) -> list[Any]:
    """Every rank's items, in rank order, on every rank."""
    if not active():
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    with heartbeat.waiting("samples"):
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(gradients: list[Tensor], bucket_elements: int = 1 << 24) -> None:
    """All-reduce gradients in place, in buckets of one dtype; float32 on the wire for bfloat16 gradients."""
    if not active():
        return
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel()
        if size >= bucket_elements:
            _reduce_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _reduce_bucket(bucket)


def _reduce_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1).float() for gradient in bucket])
    with heartbeat.waiting("gradients"):
        dist.all_reduce(flat)
    start = 0
    for gradient in bucket:
        end = start + gradient.numel()
        gradient.copy_(flat[start:end].view_as(gradient))
        start = end


def any_rank(flag: int) -> int:
    """The largest value over ranks: one rank's signal stops all of them at the same step."""
    if not active():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([flag], device=device)
    with heartbeat.waiting("the end of the step"):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())


def barrier() -> None:
    if active():
        with heartbeat.waiting("a barrier"):
            dist.barrier()
