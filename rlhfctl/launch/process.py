"""The torchrun agent as a child: it passes signals on to its workers once and never outlives this process.

A signal goes to the workers, not to the agent: the agent would answer it by killing them, while a worker keeps a
checkpoint at its step boundary and ends by itself. A second signal kills all of them at once.
"""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from rlhfctl.launch.hang import Hang, Watchdog
from rlhfctl.stop import SIGNALS
from rlhfctl.streams import write

PR_SET_PDEATHSIG = 1
PATIENCE = 10.0  # seconds for an agent whose workers have ended on a signal
WORKER_MODULE = "rlhfctl.worker"


@dataclass(frozen=True, slots=True)
class AgentResult:
    """returncode: the agent's own. signum: the signal this process was asked to stop with, or None.

    hang: the last one that was ended, or None. death: see `first_death`.
    """

    returncode: int
    signum: int | None
    hang: Hang | None = None
    death: tuple[int, int] | None = None


def run_agent(
    argv: list[str],
    env: dict[str, str],
    log: Path,
    console: Path,
    stderr: TextIO,
    keep_open: list[int],
    received: list[int],
    watchdog: Watchdog | None = None,
) -> AgentResult:
    """Run the agent to its end. log: its own output. console: the file rank 0 writes lines for the user to.

    keep_open: descriptors that live as long as the agent (the run directory's lock). received: the signals of this
    process, see `noting_signals`. watchdog: finds ranks that hang; they are killed, which the agent answers as any
    death.
    """
    with open(log, "ab") as output:
        agent = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C in the terminal reaches this process alone
            pass_fds=keep_open,
            preexec_fn=die_with_parent,
        )
        follow = follow_file(console)
        try:
            hang, death = supervise(agent, received, follow, stderr, watchdog)
        except BaseException:
            kill_all(agent)
            raise
        for line in follow:
            if line is None:
                break
            write(stderr, line)
    return AgentResult(agent.returncode, received[0] if received else None, hang, death)


def supervise(
    agent: "subprocess.Popen[bytes]",
    received: list[int],
    follow: Iterator[str | None],
    stderr: TextIO,
    watchdog: Watchdog | None,
) -> tuple[Hang | None, tuple[int, int] | None]:
    """Wait for the agent; hand the first signal to each worker once, kill everything at the second, and what hangs.

    Returns the last hang, and the first death that was seen.
    """
    told: set[int] = set()
    alone: float | None = None  # since when the agent has no workers left
    announced = False
    hung = death = None
    while agent.poll() is None:
        death = death or first_death(agent.pid)
        for line in follow:
            if line is None:
                break
            write(stderr, line)
        if len(received) > 1:
            kill_all(agent)
        elif received:
            if not announced:
                announced = True
                name = signal.Signals(received[0]).name
                write(stderr, f"{name}: stopping at the step boundary with a checkpoint; once more kills\n")
            # Looked up each time: a worker may only just be starting. None yet: there is nothing to keep.
            workers = worker_pids(agent.pid)
            if not workers and not told:
                kill_all(agent)
            for pid in workers - told:
                told.add(pid)
                send(pid, signal.SIGINT if received[0] == signal.SIGINT else signal.SIGTERM)
            alone = None if workers else alone or time.monotonic()
            # One with restarts left takes the end for a failure, and waits for nodes that have gone.
            if alone is not None and time.monotonic() - alone > PATIENCE:
                kill_all(agent)
        hang = watchdog.look(time.monotonic(), lambda: worker_pids(agent.pid)) if watchdog else None
        if hang is not None:
            hung = hang
            write(stderr, f"{hang.sentence}\n")
            end_hang(agent, hang)
        time.sleep(0.05)
    return hung, death


def end_hang(agent: "subprocess.Popen[bytes]", hang: Hang) -> None:
    """Kill the ranks that hang: the agent starts all of them again, or ends the others. Not ours: end our part."""
    for pid in hang.pids:
        send(pid, signal.SIGKILL)
    if not hang.pids:
        kill_all(agent)


@contextmanager
def noting_signals() -> Iterator[list[int]]:
    """The list fills with the signals that arrive; a signal that is ignored here (nohup) stays ignored."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous = {}
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def follow_file(path: Path) -> Iterator[str | None]:
    """Whole lines as they are appended; None when there is nothing more for now. The file may not exist yet."""
    position = 0
    while True:
        try:
            with open(path, "rb") as file:
                file.seek(position)
                chunk = file.read()
        except FileNotFoundError:
            chunk = b""
        whole = chunk[: chunk.rfind(b"\n") + 1]
        position += len(whole)
        yield from whole.decode(errors="replace").splitlines(keepends=True)
        yield None


def worker_pids(agent: int) -> set[int]:
    """The agent's children that run the worker module (it also has helpers of its own)."""
    pids = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            parent = int(stat.rsplit(")", 1)[1].split()[1])  # the name in parentheses may hold anything
            if parent == agent and WORKER_MODULE in (entry / "cmdline").read_text().split("\0"):
                pids.add(int(entry.name))
        except (OSError, ValueError, IndexError):
            continue  # it ended while we looked
    return pids


def first_death(agent: int) -> tuple[int, int] | None:
    """(pid, exit code, negative for a signal) of a child that failed and that the agent has not looked at yet.

    DeepSpeed's launcher looks once a second, in order of rank, and tells the first that it finds: after a death by a
    signal that is as often a rank that lost its peer. SIGTERM is how it ends the others.
    """
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    except OSError:
        return None
    deaths = [(int(child), code) for child in children if (code := exit_code_of(child)) is not None]
    failed = [(pid, code) for pid, code in deaths if code not in (0, -signal.SIGTERM)]
    return min(failed, key=lambda death: death[1], default=None)  # by a signal first: the other lost its peer


def exit_code_of(pid: str) -> int | None:
    """Of a process that is dead and not yet waited for, as Popen tells it; None while it lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    if fields[0] != "Z":
        return None
    return os.waitstatus_to_exitcode(int(fields[-1]))


def kill_all(agent: "subprocess.Popen[bytes]") -> None:
    """End the agent and its workers now."""
    workers = worker_pids(agent.pid)
    send(agent.pid, signal.SIGKILL)
    for pid in workers:
        send(pid, signal.SIGKILL)
    agent.wait()


def send(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return  # already gone


def die_with_parent() -> None:
    """The kernel kills this process when its parent dies, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


FAILURE = re.compile(r"^  rank\s+: (\d+) .*\n  exitcode\s+: (-?\d+) \(pid: (\d+)\)", re.MULTILINE)


def killed_rank(log: Path) -> tuple[int, int, int] | None:
    """(rank, exit code, pid) of a worker that died by a signal, as torchrun tells it: it left no word of its own.

    Not SIGTERM: that is how the agent ends the others. torchrun's own root cause goes by whole seconds, and is as
    often the rank that lost its peer.
    """
    report = log.read_text(errors="replace").rpartition("\nFailures:\n")[2]
    failures = [(int(rank), int(code), int(pid)) for rank, code, pid in FAILURE.findall(report)]
    return next((failure for failure in failures if failure[1] < 0 and failure[1] != -signal.SIGTERM), None)


MEETING = {
    "RendezvousTimeoutError": "the other nodes did not come within launch.timeout: give the same command on all",
    "RendezvousConnectionError": "node 0 cannot be reached at launch.rdzv_endpoint: is it started, and the port open?",
    "EADDRINUSE": "the port of launch.rdzv_endpoint is in use on this node: choose another one on all nodes",
}


def failed_meeting(log: Path) -> str | None:
    """A sentence where the nodes did not find each other, so that no worker was ever started."""
    text = log.read_text(errors="replace")
    return next((sentence for sign, sentence in MEETING.items() if sign in text), None)


def describe_exit(code: int) -> str:
    """A worker's exit code in words."""
    if code >= 0:
        return f"the worker ended with exit code {code} and left no error"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (often the kernel's out-of-memory killer: see dmesg)" if code == -signal.SIGKILL else ""
    return f"the worker was killed by {name}{hint}"
