"""A worker of another node trains by what the leader's node has written, also where it was there first."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch.distributed as dist

from rlhfctl.launch.deepspeed import free_port
from rlhfctl.recipe.load import dump, load_recipe
from rlhfctl.worker import agree_on


def report_agreed(rank: int, told: int, meeting: str, queue: "Queue[tuple[int, int]]") -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    queue.put((rank, agree_on(told)))
    dist.destroy_process_group()


@pytest.mark.parametrize("leader", [0, 1])
def test_the_attempt_is_the_leader_s_whichever_ranks_its_node_has(leader: int, tmp_path: Path) -> None:
    """torchrun numbers nodes by their addresses as texts: rank 0 is on 10.0.0.10 where 10.0.0.2 leads."""
    fork = multiprocessing.get_context("fork")
    queue: Queue[tuple[int, int]] = fork.Queue()
    ranks = [
        fork.Process(
            target=report_agreed, args=(rank, 3 * (rank == leader), str(tmp_path / "meeting"), queue)
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    assert sorted(queue.get(timeout=60) for _ in ranks) == [(0, 3), (1, 3)]
    for process in ranks:
        process.join(60)


@pytest.mark.heavy
def test_a_recipe_that_changes_after_it_was_read(chains: Path, tmp_path: Path) -> None:
    def write(steps: int) -> None:
        overrides = [
            f"policy={{from_config: {chains}/model, tokenizer: {chains}/model}}",
            f"data.train=[{{path: {chains}/data/sft.jsonl, limit: 32}}]",
            "data.eval=[]",
            "reward=null",
            "rollout=null",
            "train.log_every=1",
            f"train.steps={steps}",
            "launch={nproc_per_node: 2, threads: 1, timeout: 60}",
        ]
        (tmp_path / "recipe.yaml").write_text(dump(load_recipe("quickstart/sft", overrides, "sft").recipe))

    def start(rank: int, attempt: int) -> subprocess.Popen[str]:
        places = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        argv = [sys.executable, "-m", "rlhfctl.worker", str(tmp_path), f"--attempt={attempt}"]
        return subprocess.Popen(argv, env=os.environ | places | meeting, stderr=subprocess.PIPE, text=True)

    port = free_port()
    write(1)
    with start(1, 0) as follower:
        deadline = time.monotonic() + 120
        # torch is loaded after the recipe was read.
        while "libtorch_cpu" not in Path(f"/proc/{follower.pid}/maps").read_text():
            assert follower.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        write(3)
        with start(0, 1) as leader:
            told = [process.communicate(timeout=180)[1] for process in (leader, follower)]
    assert (leader.returncode, follower.returncode) == (0, 0), told
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
