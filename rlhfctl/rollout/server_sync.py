"""Bringing the policy's weights to rollout servers, as files or by broadcast. Only rank 0 does this.

weights: (name, tensor) of every one, which exist a bucket at a time where the trainer keeps them in parts.

A server that fails is left out and named; in a broadcast all of them fail together, because a group that one member
has left cannot go on.
"""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rlhfctl.recipe.rollout_server import RolloutServer
from rlhfctl.rollout import weight_broadcast, weight_files
from rlhfctl.rollout.handshake import ServerInfo
from rlhfctl.rollout.parallel import in_parallel
from rlhfctl.rollout.vllm_client import Client, Lost
from rlhfctl.rollout.vllm_process import free_port

Failed = dict[str, Lost]  # by url
Weights = Iterator[tuple[str, Tensor]]


def send_files(
    spec: RolloutServer, clients: list[Client], weights: Weights, size: int, ends: float
) -> Failed:
    """Written once, read by every server. size: bytes of all; ends: time.monotonic() at which the time is used up."""
    directory = weight_files.directory(spec.sync_dir, size)
    try:
        tensors = weight_files.write(weights, directory)
        return each(clients, lambda client: client.call("sync_files", [str(directory), tensors], left(ends)))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Broadcaster:
    """The trainer's end of the group; it is made at the first sync, for all servers and the rest of the run."""

    def __init__(self, infos: list[ServerInfo], device: torch.device) -> None:
        self.infos, self.device = infos, device
        self.group: weight_broadcast.Group | None = None

    def send(self, clients: list[Client], weights: Weights, ends: float) -> Failed:
        """clients: of all servers, in the order of infos. Raises what torch.distributed raises."""
        with ThreadPoolExecutor(1) as aside:
            if self.group is None:
                counts = [info.workers for info in self.infos]
                first = dict(
                    zip((info.url for info in self.infos), itertools.accumulate([1, *counts]), strict=False)
                )
                address, port, world = (
                    weight_broadcast.own_address(self.infos[0].url),
                    free_port(),
                    1 + sum(counts),
                )
                joining = aside.submit(
                    each,
                    clients,
                    lambda client: client.call(
                        "sync_join", [address, port, first[client.url], world, left(ends)], left(ends)
                    ),
                )
                self.group = weight_broadcast.Group(address, port, 0, world, self.device, left(ends))
                if failed := joining.result():
                    return failed
            receiving = aside.submit(
                each, clients, lambda client: client.call("sync_receive", [], left(ends))
            )
            self.group.send(weights)
            return receiving.result()


def each(clients: list[Client], act: Callable[[Client], None]) -> Failed:
    """act at every server at once; what failed."""
    failed: Failed = {}

    def one(client: Client) -> None:
        try:
            act(client)
        except Lost as lost:
            failed[client.url] = lost

    in_parallel(clients, one, len(clients))
    return failed


def left(ends: float) -> float:
    return max(0.05, ends - time.monotonic())
