"""From launch keys and machine facts to the plan, and the plan's torchrun command line."""

import base64
import json
from typing import Any

import pytest
from pydantic import ValidationError

from rlhfctl.launch.deepspeed import deepspeed_argv
from rlhfctl.launch.plan import make_plan
from rlhfctl.launch.torchrun import torchrun_argv
from rlhfctl.preflight.devices import Gpu, Machine
from rlhfctl.preflight.nodes import Node
from rlhfctl.recipe.sections import Launch

GPU = Gpu("H", 80 << 30, (9, 0))
CPU_BOX = Machine(cores=8, memory=1 << 34, gpus=(), torch_cuda=False)
GPU_BOX = Machine(cores=32, memory=1 << 37, gpus=(GPU,) * 4, torch_cuda=True)
NODE = Node("10.0.0.1:29400", "10.0.0.2", "eth1", leader=False)


def launch(**keys: Any) -> Launch:
    return Launch(**keys)


@pytest.mark.parametrize(
    ("keys", "machine", "expected"),
    [
        ({}, CPU_BOX, ("inline", "cpu", 1, 8)),
        ({}, GPU_BOX, ("torchrun", "cuda", 4, 8)),
        ({"nproc_per_node": 1}, GPU_BOX, ("inline", "cuda", 1, 32)),
        ({"launcher": "inline"}, GPU_BOX, ("inline", "cuda", 1, 32)),
        ({"nproc_per_node": 2}, CPU_BOX, ("torchrun", "cpu", 2, 4)),
        ({"nproc_per_node": 16}, CPU_BOX, ("torchrun", "cpu", 16, 1)),
        ({"launcher": "torchrun"}, CPU_BOX, ("torchrun", "cpu", 1, 8)),
        ({"max_restarts": 3}, CPU_BOX, ("torchrun", "cpu", 1, 8)),
        ({"threads": 3}, CPU_BOX, ("inline", "cpu", 1, 3)),
        ({"launcher": "deepspeed"}, CPU_BOX, ("deepspeed", "cpu", 1, 8)),
    ],
)
def test_auto_choices(keys: dict[str, Any], machine: Machine, expected: tuple[Any, ...]) -> None:
    plan = make_plan(launch(**keys), machine, {})
    assert (plan.launcher, plan.device, plan.processes, plan.threads) == expected
    assert plan.env["OMP_NUM_THREADS"] == str(plan.threads)
    assert plan.env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_gpus_under_a_cpu_torch_are_not_used() -> None:
    machine = Machine(cores=8, memory=1 << 34, gpus=(GPU,), torch_cuda=False)
    assert make_plan(launch(), machine, {}).device == "cpu"


def test_the_users_environment_wins_over_defaults_and_the_recipe_over_both() -> None:
    environ = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7", "GLOO_SOCKET_IFNAME": "wg0"}
    plan = make_plan(launch(launcher="torchrun"), CPU_BOX, environ)
    assert (plan.threads, plan.env["GOMP_SPINCOUNT"], plan.env["GLOO_SOCKET_IFNAME"]) == (2, "7", "wg0")
    assert make_plan(launch(threads=5), CPU_BOX, environ).env["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"launcher": "inline", "nproc_per_node": 2}, "inline is one process"),
        ({"launcher": "inline", "nnodes": 2, "rdzv_endpoint": "a:1"}, "inline is one process"),
        ({"launcher": "inline", "max_restarts": 1}, "max_restarts needs"),
        ({"launcher": "inline", "hostfile": "h"}, "inline is one"),
        ({"launcher": "deepspeed", "max_restarts": 1}, "restarts nothing"),
        ({"launcher": "deepspeed", "nnodes": 2, "rdzv_endpoint": "a:1"}, "does not number nodes"),
        ({"hostfile": "h", "nnodes": 2, "rdzv_endpoint": "a:1"}, "counts machines and processes"),
        ({"hostfile": "h", "nproc_per_node": 2}, "counts machines and processes"),
        ({"hostfile": "h", "node_rank": 0}, "which place this machine has"),
        ({"nnodes": 2}, "needs launch.rdzv_endpoint"),
        ({"rdzv_endpoint": "a:1"}, "are for launch.nnodes > 1"),
        ({"node_rank": 0}, "are for launch.nnodes > 1"),
        ({"nnodes": 2, "rdzv_endpoint": "a:1", "node_rank": 2}, "does not exist"),
        ({"nnodes": 2, "rdzv_endpoint": "a:1", "node_rank": 1, "max_restarts": 1}, "remove launch.node_rank"),
    ],
)
def test_keys_that_would_be_ignored_are_errors(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        launch(**keys)


def test_one_node_meets_on_loopback() -> None:
    plan = make_plan(launch(nproc_per_node=2), CPU_BOX, {})
    argv = torchrun_argv(plan, "run", None)
    assert argv[1:] == [
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "--rdzv-id=run",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        "--redirects=3",
        "--monitor-interval=0.5",
    ]
    assert plan.env["GLOO_SOCKET_IFNAME"] == "lo"
    assert (plan.world, plan.leader) == (2, True)


def test_several_nodes_meet_at_the_endpoint() -> None:
    keys = {"nnodes": 2, "nproc_per_node": 2, "rdzv_endpoint": "10.0.0.1:29400"}
    plan = make_plan(launch(**keys), CPU_BOX, {}, NODE)
    argv = torchrun_argv(plan, "run", None)
    assert "--rdzv-endpoint=10.0.0.1:29400" in argv
    assert "--rdzv-conf=is_host=0,join_timeout=1800" in argv
    assert "--local-addr=10.0.0.2" in argv
    assert (plan.world, plan.leader, plan.env["GLOO_SOCKET_IFNAME"]) == (4, False, "eth1")
    static = torchrun_argv(plan, "run", 1)
    assert {"--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29400"} <= set(static)
    assert not any(argument.startswith("--rdzv-endpoint") for argument in static)


def test_deepspeeds_launcher_is_taken_where_deepspeed_partitions() -> None:
    assert make_plan(launch(), CPU_BOX, {}, partitioned=True).launcher == "deepspeed"
    assert make_plan(launch(nproc_per_node=2), CPU_BOX, {}, partitioned=True).launcher == "deepspeed"
    assert make_plan(launch(max_restarts=1), CPU_BOX, {}, partitioned=True).launcher == "torchrun"
    assert make_plan(launch(launcher="inline"), CPU_BOX, {}, partitioned=True).launcher == "inline"
    nodes = launch(nnodes=2, rdzv_endpoint="a:1")
    assert make_plan(nodes, CPU_BOX, {}, NODE, partitioned=True).launcher == "torchrun"


def test_deepspeeds_launcher_is_told_of_every_node() -> None:
    keys = {"launcher": "deepspeed", "nnodes": 2, "nproc_per_node": 2, "rdzv_endpoint": "10.0.0.1:29400"}
    plan = make_plan(launch(**keys, node_rank=1), GPU_BOX, {}, NODE)
    argv = deepspeed_argv(plan, 1, {"CUDA_VISIBLE_DEVICES": "2, 3"})
    assert {"--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29400", "--module"} <= set(argv)
    assert slots(argv) == {"node0": ["2", "3"], "node1": ["2", "3"]}
    assert plan.env["DS_ACCELERATOR"] == "cuda"


def slots(argv: list[str]) -> Any:
    info = next(word for word in argv if word.startswith("--world_info=")).partition("=")[2]
    return json.loads(base64.urlsafe_b64decode(info))


def test_deepspeeds_launcher_takes_the_gpus_that_were_chosen_by_name() -> None:
    keys = {"launcher": "deepspeed", "nproc_per_node": 2}
    for names in ("GPU-1a,GPU-2b,GPU-3c,GPU-4d", "MIG-5,MIG-6,7,8"):
        chosen = {"CUDA_VISIBLE_DEVICES": names}
        plan = make_plan(launch(**keys), GPU_BOX, chosen)
        assert slots(deepspeed_argv(plan, None, chosen)) == {"node0": names.split(",")[:2]}
        assert plan.env["RLHFCTL_GPUS"] == names
