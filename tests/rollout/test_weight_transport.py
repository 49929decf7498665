"""Weights from one side to the other, by files and by broadcast, and the process that ends a server."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rlhfctl.errors import Unable
from rlhfctl.launch.plan import make_plan
from rlhfctl.preflight.devices import Gpu, Machine
from rlhfctl.recipe.sections import Launch
from rlhfctl.rollout import weight_broadcast, weight_files
from rlhfctl.rollout.vllm_process import Shape, argv, environment, free_port, last_error
from rlhfctl.rollout.vllm_server import gpus_of_servers


def weights():
    generator = torch.Generator().manual_seed(1)
    return [
        ("a.weight", torch.randn(7, 5, generator=generator)),
        ("odd", torch.randn(3, generator=generator).to(torch.bfloat16)),
        ("scalar", torch.tensor(2.5)),
        ("b.weight", torch.randn(9, 11, generator=generator)[:, ::2]),
        ("after", torch.arange(6, dtype=torch.float32)),
    ]


def same(found):
    wanted = weights()
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (_, left), (_, right) in zip(found, wanted, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("bucket", [1, 150, 1 << 20])
def test_files_hold_every_tensor_once(tmp_path, bucket):
    assert weight_files.write(iter(weights()), tmp_path, bucket) == 5
    assert len(list(tmp_path.iterdir())) == {1: 5, 150: 3, 1 << 20: 1}[bucket]
    found = list(weight_files.read(str(tmp_path), 5))
    same(sorted(found, key=lambda each: [name for name, _ in weights()].index(each[0])))
    with pytest.raises(ValueError, match=r"5 tensors in .*, 6 were written"):
        list(weight_files.read(str(tmp_path), 6))
    with pytest.raises(FileNotFoundError, match="no weights in"):
        list(weight_files.read(str(tmp_path / "elsewhere"), 5))


def test_what_a_killed_run_left_in_memory_goes_with_the_next_sync(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MEMORY", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f"rlhfctl-sync-{pid}-x").mkdir()
        (tmp_path / f"rlhfctl-sync-{pid}-new").mkdir()
        os.utime(tmp_path / f"rlhfctl-sync-{pid}-x", (0, 0))
    made = weight_files.directory(None, 1)
    assert made.parent == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {
        f"rlhfctl-sync-{os.getppid()}-x",
        f"rlhfctl-sync-{os.getppid()}-new",
        f"rlhfctl-sync-{dead.pid}-new",
        made.name,
    }
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    assert weight_files.directory(str(chosen), 1).parent == chosen


def test_a_broadcast_reaches_every_server_in_order(tmp_path):
    """Three ranks of gloo in one process: the trainer and two workers, two syncs of several buckets each."""
    port, cpu = free_port(), torch.device("cpu")
    found = {1: [], 2: []}

    def worker(rank):
        group = weight_broadcast.Group("127.0.0.1", port, rank, 3, cpu, 20.0)
        found[rank] = [list(group.receive()), list(group.receive())]

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in found]
    for thread in threads:
        thread.start()
    group = weight_broadcast.Group("127.0.0.1", port, 0, 3, cpu, 20.0)
    group.send(iter(weights()), 150)
    group.send(iter(weights()[:2]))
    for thread in threads:
        thread.join(20)
    for first, second in found.values():
        same(first)
        assert [name for name, _ in second] == ["a.weight", "odd"]


def test_a_worker_that_never_comes_is_waited_for_in_bounded_time():
    began = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)timed? ?out"):
        weight_broadcast.Group("127.0.0.1", free_port(), 0, 2, torch.device("cpu"), 1.0)
    assert time.monotonic() - began < 30


SERVER = """
import signal, subprocess, sys, time
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "100"])
with open(sys.argv[1], "w") as file:
    file.write(str(child.pid))
time.sleep(100)
"""
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "rlhfctl.rollout.guardian", *sys.argv[1:]], stdin=subprocess.PIPE,
                 start_new_session=True)
time.sleep(100)
"""


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_a_server_and_its_children_end_with_the_run(tmp_path, end):
    server = [sys.executable, "-c", SERVER, str(tmp_path / "pid"), "gentle"]
    if end == "killed":
        parent = subprocess.Popen([sys.executable, "-c", PARENT, *server])
    else:
        guardian = [sys.executable, "-m", "rlhfctl.rollout.guardian", *server]
        parent = subprocess.Popen(guardian, stdin=subprocess.PIPE, start_new_session=True)
    grandchild = wait_for_pid(tmp_path / "pid")
    session = os.getsid(grandchild)
    assert len(members(session)) == 3  # guardian, server, its child
    if end == "killed":
        parent.send_signal(signal.SIGKILL)
    else:
        parent.stdin.close()
    parent.wait(20)
    ends = time.monotonic() + 20
    while members(session) and time.monotonic() < ends:
        time.sleep(0.05)
    assert members(session) == []


def wait_for_pid(path: Path) -> int:
    ends = time.monotonic() + 30
    while not (path.exists() and path.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    return int(path.read_text())


def members(session: int) -> list[str]:
    """States of the processes of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(entry.name)
    return found


def test_a_started_server_sees_nothing_of_torchrun_and_its_own_gpu(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    on_cpu = Shape(tmp_path, "float32", 256, 1 << 20, False, 1, ())
    kept = environment(on_cpu, 0)
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & set(kept)
    assert kept["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--no-enable-chunked-prefill" in argv(on_cpu, 1234)
    on_gpus = Shape(tmp_path, "bfloat16", 256, 1 << 20, False, 1, ("2", "5"))
    assert environment(on_gpus, 1)["CUDA_VISIBLE_DEVICES"] == "5"
    assert "--no-enable-chunked-prefill" not in argv(on_gpus, 1234)
    line = argv(on_gpus, 1234)
    assert line[line.index("--host") + 1] == "127.0.0.1"


def test_beside_deepspeeds_launcher_servers_get_the_gpus_that_no_rank_has(monkeypatch):
    """It tells its processes LOCAL_SIZE, and shows them their own devices alone."""
    machine = Machine(8, 1 << 36, (Gpu("H", 80 << 30, (9, 0)),) * 4, True)
    plan = make_plan(Launch(launcher="deepspeed", nproc_per_node=2), machine, {})
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in {**plan.env, "CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert gpus_of_servers(2) == ("2", "3")
    with pytest.raises(Unable, match=r"3 rollout server\(s\) beside 2 trainer process"):
        gpus_of_servers(3)


def test_the_cause_of_a_failed_start_is_the_first_error_of_its_log(tmp_path):
    log = tmp_path / "server.log"
    log.write_text(
        "INFO starting\n(EngineCore pid=1) ERROR ValueError: no kernel for heads of 16\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed\n"
    )
    assert last_error(log) == f"ValueError: no kernel for heads of 16 (log: {log})"
    log.write_text("")
    assert last_error(log) == f"see {log}"
