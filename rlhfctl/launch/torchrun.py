"""The torchrun command line of a plan."""

import math
import sys

from rlhfctl.launch.plan import Plan


def torchrun_argv(plan: Plan, name: str, node_rank: int | None) -> list[str]:
    """The options of one node's torchrun; `--log-dir=...` and the program to start follow them.

    name: the rendezvous id, equal on all nodes. One node meets on the loopback address at a free port; several meet
    at the plan's endpoint.
    """
    argv = [sys.executable, "-m", "torch.distributed.run"]
    argv += [f"--nnodes={plan.nnodes}", f"--nproc-per-node={plan.processes}"]
    argv += [f"--max-restarts={plan.max_restarts}", f"--rdzv-id={name}"]
    if plan.node is None:
        argv += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    elif node_rank is not None:
        host, _, port = plan.node.endpoint.partition(":")
        argv += [f"--node-rank={node_rank}", f"--master-addr={host}", f"--master-port={port}"]
    else:
        argv += ["--rdzv-backend=c10d", f"--rdzv-endpoint={plan.node.endpoint}"]
        join = f"join_timeout={math.ceil(plan.timeout)}"
        argv += [f"--rdzv-conf=is_host={int(plan.node.leader)},{join}", f"--local-addr={plan.node.address}"]
    return [*argv, "--redirects=3", "--monitor-interval=0.5"]
