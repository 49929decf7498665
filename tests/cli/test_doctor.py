"""doctor on this machine, and on one that is made worse: a torch that does not load, too many threads, a taken port."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.preflight.survey import SERVICE_PORT

Cli = Callable[..., Any]


def rows(ended: Any) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in ended.object["checks"]}


def test_this_machine_can_train(cli: Cli) -> None:
    ended = cli("doctor", "--json")
    told = rows(ended)
    assert ended.code == 0
    assert told["torch"]["status"] == "ok"
    assert told["torch"]["found"].startswith(version("torch"))
    assert told["transformers"]["found"] == version("transformers")
    machine = {"gpu", "bf16", "compiler", "threads", "memory", "disk", "shm", "hub cache", "port"}
    assert machine | {"nccl", "attention", "deepspeed", "vllm", "bitsandbytes"} <= set(told)
    counted = {
        status: sum(row["status"] == status for row in told.values()) for status in ("ok", "warn", "fail")
    }
    assert ended.object["summary"] == counted
    assert all(row["fix"] for row in told.values() if row["status"] != "ok")


def test_a_line_a_subject_and_quiet_leaves_out_what_is_well(cli: Cli) -> None:
    whole, quiet = cli("doctor").out.splitlines(), cli("doctor", "-q").out.splitlines()
    assert {line.split()[0] for line in whole} <= {"ok", "warn", "fail"}
    assert quiet == [line for line in whole if not line.startswith("ok")]


def test_a_torch_that_does_not_load_is_a_failure(cli: Cli, tmp_path: Path, repo: Path) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    ended = cli("doctor", "--json", PYTHONPATH=f"{broken.parent}{os.pathsep}{repo}")
    assert ended.code == 4
    assert ended.object["status"] == "unable"
    assert rows(ended)["torch"]["status"] == "fail"
    assert "libcudart.so.13" in rows(ended)["torch"]["found"]
    assert ended.err == "this machine cannot train: torch\n"


def test_more_threads_than_cores(cli: Cli) -> None:
    assert rows(cli("doctor", "--json", OMP_NUM_THREADS="4096"))["threads"]["status"] == "warn"


def test_the_port_of_the_service(cli: Cli) -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", SERVICE_PORT))
        except OSError:
            pytest.skip(f"port {SERVICE_PORT} is taken already")
        taken.listen()
        assert rows(cli("doctor", "--json"))["port"]["status"] == "warn"
    assert rows(cli("doctor", "--json"))["port"]["status"] == "ok"


def test_the_asking_process_imports_no_torch() -> None:
    code = (
        "import sys; from rlhfctl.preflight.survey import survey; survey(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("option", [("--steps", "1,1"), ("--keep", "somewhere")])
def test_options_of_the_proof_alone_are_refused(cli: Cli, option: tuple[str, str]) -> None:
    ended = cli("doctor", *option)
    assert ended.code == 2
    assert f"{option[0]} is for --verify-resume" in ended.err
