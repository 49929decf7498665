"""One module on several processes of this machine that meet over gloo, each with one thread; what each printed last."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any


def on_ranks(module: str, arguments: list[str], world: int) -> list[dict[str, Any]]:
    """`python -m module arguments` as ranks 0 .. world - 1: the JSON of each one's last line. Raises RuntimeError with
    the last line of the rank that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "1000",
        "DS_ACCELERATOR": "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            for rank in range(world)
        ]
        printed = [process.communicate()[0] for process in started]
        if any(process.returncode for process in started):
            said.seek(0)
            raise RuntimeError(
                next((line for line in reversed(said.read().splitlines()) if line.strip()), "")
            )
    return [json.loads(text.splitlines()[-1]) for text in printed]


def set_up() -> tuple[int, int]:
    """In a started process: (rank, world), libraries imported as a run does it, the group of all ranks joined."""
    import peft  # noqa: F401  imported by the trainer where there are adapters
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    from rlhfctl.models.heap import keep_large_blocks

    keep_large_blocks()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=900))
    return rank, world


def memory(name: str) -> int:
    """Bytes of /proc/self/status: VmRSS, resident now; VmHWM, at most since the last `forget_peak`."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is resident
