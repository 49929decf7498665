"""Weights on their way to servers: broadcasts in a process group of the trainer (rank 0) and all server workers.

    for each bucket   store["bucket/S/B"] = JSON [[name, dtype, shape], ...]    then one broadcast of its bytes
    at the end        store["bucket/S/B"] = JSON null

S counts the syncs, B the buckets of one. The group is neither side's default one. nccl for tensors on GPUs, of which
no two ranks may share one; gloo for CPUs.
"""

import json
import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 512 << 20  # bytes


class Group:
    """Raises what torch.distributed raises where the others do not come within `seconds`."""

    def __init__(
        self, address: str, port: int, rank: int, world: int, device: torch.device, seconds: float
    ) -> None:
        self.device, self.syncs = device, 0
        timeout = timedelta(seconds=seconds)
        self.store: Any = dist.TCPStore(
            address, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False
        )
        meeting = dist.PrefixStore("group", self.store)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.group: Any = dist.ProcessGroupNCCL(meeting, rank, world, options)
        else:
            self.group = dist.ProcessGroupGloo(meeting, rank, world, timeout)

    def send(self, weights: Iterable[tuple[str, Tensor]], bucket: int = BUCKET) -> None:
        """From rank 0, while every other rank receives."""
        held: list[tuple[str, Tensor]] = []
        size = number = 0
        for name, tensor in weights:
            if held and size + tensor.nbytes > bucket:
                self._send(number, held)
                held, size, number = [], 0, number + 1
            held.append((name, tensor))
            size += tensor.nbytes
        self._send(number, held)
        self.store.set(self._key(number + 1), "null")
        self.syncs += 1

    def receive(self) -> Iterator[tuple[str, Tensor]]:
        """On the other ranks: what is sent, in order."""
        number = 0
        while True:
            told: list[tuple[str, str, list[int]]] | None = json.loads(self.store.get(self._key(number)))
            if told is None:
                break
            shapes = [(name, getattr(torch, dtype), torch.Size(shape)) for name, dtype, shape in told]
            sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in shapes]
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            self.group.broadcast(flat, 0).wait()
            for (name, dtype, shape), part in zip(shapes, flat.split(sizes), strict=True):
                # A slice may start between two elements of its type.
                yield name, part.clone().view(dtype).view(shape)
            number += 1
        self.syncs += 1

    def _send(self, number: int, held: list[tuple[str, Tensor]]) -> None:
        told = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in held]
        self.store.set(self._key(number), json.dumps(told))
        flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in held])
        self.group.broadcast(flat, 0).wait()

    def _key(self, number: int) -> str:
        return f"bucket/{self.syncs}/{number}"


def own_address(url: str) -> str:
    """This machine's address as the host of `url` sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only picks the route.
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])
