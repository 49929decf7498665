"""A rank that the others wait for longer than launch.timeout: found from the ranks' records, told, and ended.

Each launcher judges by the ranks of its own node, from how long it has seen them wait itself: no clock is compared with
another machine's, and a jump of the wall clock changes nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 1.0  # seconds between two looks
STATES = {
    "T": "its process is stopped (SIGSTOP)",
    "t": "its process is stopped by a debugger",
    "D": "it waits for a disk or a file system",
    "Z": "its process is dead",
}


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank last wrote (rlhfctl/heartbeat.py). waiting: the collective it waits in, None: it works."""

    rank: int
    pid: int
    node: str
    step: int
    phase: str
    waiting: str | None
    count: int


@dataclass(frozen=True, slots=True)
class Hang:
    """pids: the processes of this node that hang; empty where the cause is on another one. waits: a rank that waits."""

    sentence: str
    waits: int
    pids: frozenset[int]


class Watchdog:
    """logs: the directory of the ranks' records. node: this one's name in them. limit: launch.timeout, seconds."""

    def __init__(self, logs: Path, node: str, limit: float) -> None:
        self.logs, self.node, self.limit = logs, node, limit
        self.since: dict[int, tuple[Beat, float]] = {}
        self.last = 0.0

    def look(self, now: float, workers: Callable[[], set[int]]) -> Hang | None:
        """now: seconds of a monotonic clock. workers: the processes of this node that live; asked only in doubt."""
        if now - self.last < min(INTERVAL, self.limit / 4):
            return None
        self.last = now
        beats = read_beats(self.logs)
        for beat in beats:
            known = self.since.get(beat.rank)
            if known is None or known[0] != beat:
                self.since[beat.rank] = beat, now
        waited = {beat.rank: now - self.since[beat.rank][1] for beat in beats}
        late = [b for b in beats if b.node == self.node and b.waiting and waited[b.rank] > self.limit]
        if not late:
            return None
        alive = workers()
        # A process that is stopped hangs wherever that happened, in a wait too.
        working = [beat for beat in beats if not beat.waiting or self.is_stopped(beat)]
        late = [beat for beat in late if beat.pid in alive and beat not in working]
        strangers = [beat for beat in beats if beat.node != self.node]
        # All wait: for each other, unless one of them has only just come to where the others are.
        if not late or not (working or (strangers and min(waited.values()) > self.limit)):
            return None
        self.since.clear()  # what goes on after this gets the whole limit again
        here = frozenset(beat.pid for beat in working if beat.node == self.node) & alive
        return Hang(tell(late[0], waited, working, strangers, self.node), late[0].rank, here)

    def is_stopped(self, beat: Beat) -> bool:
        return beat.node == self.node and state_of(beat.pid) in ("T", "t")


def read_beats(logs: Path) -> list[Beat]:
    """In order of rank; what cannot be read now is read the next time."""
    found = []
    for path in logs.glob("rank*.beat"):
        try:
            found.append(Beat(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda beat: beat.rank)


def tell(late: Beat, waited: dict[int, float], working: list[Beat], strangers: list[Beat], node: str) -> str:
    """One sentence: who hangs where, who waits where, for how long."""
    seconds = f"{waited[late.rank]:.0f} s"
    place = f"rank {late.rank} has waited {seconds} in {late.phase} of step {late.step} ({late.waiting})"
    if working:
        each = [
            f"{name(beat, node)} hangs in {beat.phase} of step {beat.step}{doing(beat, node)}"
            for beat in working
        ]
        return f"{', '.join(each)}; {place}, more than launch.timeout"
    far = ", ".join(name(beat, node) for beat in strangers)
    return (
        f"{place} for {far}, more than launch.timeout, and is not heard there either: the network between the nodes is "
        "cut, or that node is gone"
    )


def name(beat: Beat, node: str) -> str:
    return f"rank {beat.rank}" + (f" on node {beat.node}" if beat.node != node else "")


def doing(beat: Beat, node: str) -> str:
    """What the kernel says about the process, where it is on this node."""
    if beat.node != node:
        return ""
    state = state_of(beat.pid)
    if state is None:
        return " (its process is gone)"
    return f" ({STATES[state]})" if state in STATES else ""


def state_of(pid: int) -> str | None:
    """The kernel's letter for what a process does; None: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return None
