"""From a recipe and the machine's facts to how the run is started. Pure: nothing is looked up or started here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlhfctl.preflight.devices import Machine, gpu_names
from rlhfctl.preflight.nodes import Node
from rlhfctl.recipe.sections import Launch

DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # libgomp's threads spin for ever between parallel regions by default, which costs 2-5x on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
CUDA_DEFAULTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True, slots=True)
class Plan:
    """processes: on this node. threads: CPU threads of each. timeout: seconds to wait for the other nodes.

    env: what is set for the workers, and only that.
    """

    launcher: Literal["inline", "torchrun", "deepspeed"]
    device: Literal["cpu", "cuda"]
    processes: int
    nnodes: int
    threads: int
    max_restarts: int
    timeout: float
    env: dict[str, str]
    node: Node | None = None

    @property
    def world(self) -> int:
        return self.processes * self.nnodes

    @property
    def leader(self) -> bool:
        """Whether this node writes the run directory."""
        return self.node is None or self.node.leader


def processes_per_node(launch: Launch, gpu_count: int) -> int:
    """auto: one per GPU, one on a CPU machine."""
    if launch.nproc_per_node != "auto":
        return launch.nproc_per_node
    return 1 if launch.launcher == "inline" else max(1, gpu_count)


def make_plan(
    launch: Launch,
    machine: Machine,
    environ: Mapping[str, str],
    node: Node | None = None,
    partitioned: bool = False,
) -> Plan:
    """`node` is needed for nnodes > 1 alone. That the launch keys agree is the recipe schema's business. partitioned:
    deepspeed.zero_stage is above 0."""
    gpu_count = len(machine.usable_gpus)
    processes = processes_per_node(launch, gpu_count)
    several = processes * launch.nnodes > 1
    launcher = choose_launcher(launch, several, partitioned)
    device: Literal["cpu", "cuda"] = "cuda" if gpu_count else "cpu"
    threads = threads_per_process(launch, machine.cores, processes, environ)

    env = dict(DEFAULTS)
    if device == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # its older name
        env |= CUDA_DEFAULTS
    if launcher == "deepspeed":
        env["DS_ACCELERATOR"] = device
        if device == "cuda":  # its processes see their own GPUs alone, and rollout servers need others
            env["RLHFCTL_GPUS"] = ",".join(gpu_names(environ, gpu_count))
    if launcher != "inline":
        # Each start gets a store of its own: torchrun's shared one still holds the addresses of the dead workers.
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        env["GLOO_SOCKET_IFNAME"] = (node.interface if node else "lo") or ""
        if node and node.interface:
            env["NCCL_SOCKET_IFNAME"] = node.interface
    env = {name: environ.get(name, value) for name, value in env.items() if value or name in environ}
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return Plan(
        launcher=launcher,
        device=device,
        processes=processes,
        nnodes=launch.nnodes,
        threads=threads,
        max_restarts=launch.max_restarts,
        timeout=launch.timeout,
        env=env,
        node=node if several else None,
    )


def choose_launcher(
    launch: Launch, several: bool, partitioned: bool
) -> Literal["inline", "torchrun", "deepspeed"]:
    """auto: DeepSpeed's launcher where it partitions, unless something is asked of torchrun: restarts, or nodes that
    number themselves."""
    if launch.launcher != "auto":
        return launch.launcher
    numbered = launch.nnodes == 1 or launch.node_rank is not None
    if partitioned and numbered and not launch.max_restarts:
        return "deepspeed"
    return "torchrun" if several or launch.max_restarts else "inline"


def threads_per_process(launch: Launch, cores: int, processes: int, environ: Mapping[str, str]) -> int:
    """launch.threads, else the user's own OMP_NUM_THREADS, else cores / processes; at least 1."""
    if launch.threads != "auto":
        return launch.threads
    wish = environ.get("OMP_NUM_THREADS", "")
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    return max(1, cores // processes)
