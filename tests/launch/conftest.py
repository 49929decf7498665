"""Two network namespaces of this machine as two hosts, joined by a virtual cable."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def ip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces joined by a cable, 10.211.77.1 and .2."""
    names = (f"rlhf{os.getpid()}a", f"rlhf{os.getpid()}b")
    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("no `ip` command (iproute2)")
    if any(out.returncode for out in made):
        for name in names:
            ip("netns", "del", name)
        pytest.skip(f"cannot make network namespaces here: {made[0].stderr.strip()}")
    try:
        ends = (f"v{os.getpid()}a", f"v{os.getpid()}b")
        assert ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]).returncode == 0
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            assert ip("link", "set", end, "netns", name).returncode == 0
            assert ip("-n", name, "addr", "add", f"10.211.77.{number}/24", "dev", end).returncode == 0
            assert ip("-n", name, "link", "set", end, "up").returncode == 0
            assert ip("-n", name, "link", "set", "lo", "up").returncode == 0
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


Login = Callable[[int, str], "subprocess.Popen[str]"]


@pytest.fixture
def login(nodes: tuple[str, str], tmp_path: Path) -> Iterator[Login]:
    """login(n, line): the shell line on host n as docs/cluster.md gives it, through `ssh -tt` to a real sshd of that
    host; where no sshd can run, in the host's namespace without one."""
    daemons: list[subprocess.Popen[bytes]] = []
    options = [f"-i{tmp_path / 'key'}", "-oUserKnownHostsFile=/dev/null", "-oStrictHostKeyChecking=no", "-q"]

    def argv(host: int, line: str) -> list[str]:
        return ["ip", "netns", "exec", nodes[0], "ssh", "-tt", *options, f"10.211.77.{host + 1}", line]

    def start_daemons() -> bool:
        for name in ("key", "hostkey"):
            made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
            subprocess.run(made, check=True, capture_output=True)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        settings = [f"-oAuthorizedKeysFile={tmp_path / 'key.pub'}", "-oStrictModes=no", "-oUsePAM=no"]
        settings += ["-oPermitRootLogin=yes", "-oPidFile=none", f"-h{tmp_path / 'hostkey'}", "-f/dev/null"]
        for name in nodes:
            command = ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", *settings]
            daemons.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 10
        while subprocess.run(argv(1, "true"), capture_output=True, stdin=subprocess.DEVNULL).returncode:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    try:
        there = os.path.exists("/usr/sbin/sshd") and start_daemons()
    except (OSError, subprocess.CalledProcessError):
        there = False

    def run(host: int, line: str) -> "subprocess.Popen[str]":
        kept = "PATH", "PYTHONPATH", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"
        given = " ".join(f"{name}={os.environ[name]}" for name in kept if name in os.environ)
        line = line.replace("rlhfctl", f"{sys.executable} -m rlhfctl", 1)
        command = argv(host, f"export {given}; {line}")
        if not there:
            command = ["ip", "netns", "exec", nodes[host], "sh", "-c", line]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    try:
        yield run
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()
