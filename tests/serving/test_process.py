"""How the command starts, what it refuses, and how it ends."""

import concurrent.futures
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhfctl.cli.serve_rm import api_key
from rlhfctl.errors import UsageError
from rlhfctl.serving.scorers import open_served


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhfctl", "serve-rm", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_it_ends_where_its_address_cannot_be_told(rules: Path) -> None:
    command = [sys.executable, "-m", "rlhfctl", "serve-rm", str(rules), "--port", "0"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 1
    assert "cannot write the result to stdout: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use(rules: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve(str(rules), "--port", str(port), "--json")
    assert done.returncode == 4
    said = json.loads(done.stdout)
    assert (said["status"], said["exit_code"]) == ("unable", 4)
    assert f"port {port} of 127.0.0.1 is in use" in said["message"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "serve what?"),
        (["RULES", "--host", "0.0.0.0"], 2, "give a key with --api-key-env"),
        (["RULES", "--api-key-env", "NOT_SET_ANYWHERE"], 2, "NOT_SET_ANYWHERE"),
        (["RULES", "--host", "no.such.host.invalid", "--api-key-env", "HOME"], 2, "is no address"),
        (["RULES", "--port", "70000"], 2, "--port"),
        (["RULES", "--max-batch", "0"], 2, "--max-batch"),
        (["absent-model"], 2, "neither a model directory nor a python file"),
        (["RULES:nothing"], 5, "has no function 'nothing'"),
        (["BROKEN"], 5, "is not python"),
        (["RAISES"], 5, "ZeroDivisionError"),
        (["OTHER"], 5, "it has grade"),
        (["EMPTY"], 2, "has no tokenizer.json"),
    ],
)
def test_what_it_refuses(rules: Path, tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\ndef score(samples): return [1]\n")
    (tmp_path / "other.py").write_text("def grade(samples): return [1]\n")
    (tmp_path / "empty").mkdir()
    names = {"RULES": str(rules), "EMPTY": str(tmp_path / "empty")}
    names |= {name.upper(): str(tmp_path / f"{name}.py") for name in ("broken", "raises", "other")}
    given = [
        names.get(word.split(":")[0], word.split(":")[0]) + word[len(word.split(":")[0]) :]
        for word in arguments
    ]
    if arguments and "--port" not in arguments:
        given += ["--port", "0"]
    done = serve(*given)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_no_client_could_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_KEY", "schl\u00fcssel")
    with pytest.raises(UsageError, match="RM_KEY: it holds characters that no HTTP header can carry"):
        api_key("RM_KEY")


def test_rules_below_a_directory_with_py_in_its_name(rules: Path, tmp_path: Path) -> None:
    (tmp_path / ".pyenv").mkdir()
    moved = shutil.copy(rules, tmp_path / ".pyenv/rules.py")
    for source in (moved, f"{moved}:score"):
        served = open_served(str(source))
        for scorer in served.scorers:
            scorer.close()
        assert served.info.name == "rules.score"


def test_a_key(start: Callable[..., Any], rules: Path, sample: Callable[..., Any]) -> None:
    service = start(rules, "--api-key-env", "RM_KEY", "--host", "0.0.0.0", RM_KEY="right")
    url = service.url.replace("0.0.0.0", "127.0.0.1")
    body = {"samples": [sample(n=1)]}
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
        for path in ("/v1/rewards", "/get_reward"):
            assert httpx.post(url + path, json=body, headers=header).status_code == 401
        assert httpx.get(f"{url}/v1/info", headers=header).status_code == 401
        assert httpx.get(f"{url}/metrics", headers=header).status_code == 401
    assert httpx.post(f"{url}/v1/rewards", content=b" " * 40_000_000).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    right = {"Authorization": "Bearer right"}
    assert httpx.post(f"{url}/v1/rewards", json=body, headers=right).json()["rewards"][0]["score"] == 1.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_asked_is_answered_before_it_ends(
    start: Callable[..., Any], rules: Path, sample: Callable[..., Any], number: signal.Signals
) -> None:
    service = start(rules)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(service.ask, sample(n=place, sleep=1.0)) for place in range(4)]
        while service.metric("rlhfctl_batch_samples_sum") + service.metric("rlhfctl_waiting_samples") < 4:
            time.sleep(0.05)
        service.process.send_signal(number)
        answers = [each.result() for each in asked]
    assert [each.json()["rewards"][0]["score"] for each in answers] == [0.0, 1.0, 2.0, 3.0]
    assert service.process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        service.ask(sample())


def test_rules_processes_end_with_it(
    start: Callable[..., Any], rules: Path, sample: Callable[..., Any]
) -> None:
    """Also where it is killed: a rules process sees the pipe close."""
    service = start(rules)
    assert service.ask(sample(n=1)).status_code == 200
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(service.process.pid)], capture_output=True, text=True, check=True
    )
    children = [int(pid) for pid in listed.stdout.split()]
    assert children
    service.process.kill()
    service.process.wait(10)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_rules_that_hang_or_die_cost_nobody_else_a_sample(
    start: Callable[..., Any], tmp_path: Path, sample: Callable[..., Any]
) -> None:
    path = tmp_path / "dies.py"
    path.write_text(
        "import os, time\n"
        "def score(samples):\n"
        "    time.sleep(0.2)\n"
        "    if any('die' in s['metadata'] for s in samples): os._exit(3)\n"
        "    return [float(s['metadata']['n']) for s in samples]\n"
    )
    service = start(path)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(service.ask, sample(n=n, **({"die": 1} if n == 5 else {}))) for n in range(16)]
        rewards = [each.result().json()["rewards"][0] for each in asked]
    assert [each["score"] for each in rewards] == [None if n == 5 else float(n) for n in range(16)]
    assert "ended with exit code 3" in rewards[5]["error"]
