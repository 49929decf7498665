"""What the ranks of a run agree on about a rollout engine that they share: an error of one is an error of all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rlhfctl.errors import RlhfctlError
from rlhfctl.heartbeat import heartbeat

T = TypeVar("T")


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if several() else 0


def from_rank_zero(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; an RlhfctlError that it raises there is raised on every rank."""
    if not several():
        return make()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except RlhfctlError as error:
            told[1] = error
    with heartbeat.waiting("rank 0's engine"):
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def raise_together(error: RlhfctlError | None) -> None:
    """Raise the first rank's error on every rank, nothing where none has one."""
    errors: list[RlhfctlError | None] = [error]
    if several():
        errors = [None] * dist.get_world_size()
        with heartbeat.waiting("the engine's end"):
            dist.all_gather_object(errors, error)
    first = next((each for each in errors if each is not None), None)
    if first is not None:
        raise first
