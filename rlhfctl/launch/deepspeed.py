"""DeepSpeed's launcher: what its `deepspeed` command starts on each node, started here directly.

So it logs in nowhere: the same command is given on every node, as with torchrun. It restarts nothing.
"""

import base64
import json
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from rlhfctl.launch.plan import Plan
from rlhfctl.preflight.devices import gpu_names
from rlhfctl.preflight.nodes import split_endpoint


def deepspeed_argv(plan: Plan, node_rank: int | None, environ: Mapping[str, str]) -> list[str]:
    """The options of one node's launcher; the module to start and its arguments follow them.

    One node meets on the loopback address at a free port, several at the plan's endpoint.
    """
    names = [f"node{number}" for number in range(plan.nnodes)]
    # The launcher shows its processes these GPUs alone: those that the user chose, not from 0 on.
    slots = gpu_names(environ, plan.processes)
    info = base64.urlsafe_b64encode(json.dumps(dict.fromkeys(names, slots)).encode()).decode()
    host, port = split_endpoint(plan.node.endpoint) if plan.node else ("127.0.0.1", free_port())
    argv = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={info}"]
    argv += [f"--node_rank={node_rank or 0}", f"--master_addr={host}", f"--master_port={port}"]
    return [*argv, "--no_local_rank", "--module"]


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ENDED = re.compile(r"exits with return code = (-\d+)")


def killed_by(log: Path) -> int | None:
    """The negative exit code of a worker that died by a signal, as the launcher tells it; not which one it was."""
    found = ENDED.findall(log.read_text(errors="replace"))
    return int(found[-1]) if found else None
