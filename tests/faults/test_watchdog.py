"""Which ranks the launcher calls hung, from the records that ranks really write."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfctl.heartbeat import Heartbeat
from rlhfctl.launch.hang import Watchdog, read_beats

LIMIT = 100.0


class Ranks:
    """Two ranks that write their records, and a launcher that looks once a second of a clock of its own."""

    def __init__(self, logs: Path, monkeypatch: pytest.MonkeyPatch, nodes: tuple[str, str]) -> None:
        self.now, self.alive = 1000.0, {os.getpid()}
        self.beats = []
        for rank, node in enumerate(nodes):
            monkeypatch.setenv("RLHFCTL_NODE", node)
            self.beats.append(Heartbeat())
            self.beats[rank].open(logs / f"rank{rank}.beat", rank)
            self.beats[rank].at("train", 7)
        self.watchdog = Watchdog(logs, nodes[0], LIMIT)

    def after(self, seconds: float) -> str | None:
        """The sentence of the first hang within so many seconds."""
        end = self.now + seconds
        while self.now < end:
            self.now += 1.0
            hang = self.watchdog.look(self.now, lambda: self.alive)
            if hang is not None:
                self.hang = hang
                return hang.sentence
        return None


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ranks]:
    return lambda *nodes: Ranks(tmp_path, monkeypatch, nodes or ("", ""))


def test_long_work_is_no_hang(ranks: Callable[..., Ranks]) -> None:
    two = ranks()
    two.beats[1].at("rollout")
    assert two.after(10 * LIMIT) is None  # nobody waits
    with two.beats[0].waiting("samples"):
        assert two.after(LIMIT - 5) is None
        two.beats[1].at("reward")
    with two.beats[0].waiting("gradients"):  # another wait: counted from its own beginning
        assert two.after(LIMIT - 5) is None


def test_the_rank_that_the_other_waits_for_is_named(ranks: Callable[..., Ranks]) -> None:
    two = ranks()
    two.beats[1].at("rollout")
    with two.beats[0].waiting("samples"):
        said = two.after(LIMIT + 5)
        assert said == (
            "rank 1 hangs in rollout of step 7; rank 0 has waited 101 s in train of step 7 (samples), "
            "more than launch.timeout"
        )
        assert (two.hang.pids, two.hang.waits) == ({os.getpid()}, 0)
        # Told once; and once its processes are gone, what they wrote is no rank's any more.
        assert two.after(LIMIT - 5) is None
        two.alive = set()
        assert two.after(3 * LIMIT) is None


def test_both_wait(ranks: Callable[..., Ranks]) -> None:
    """On one machine neither is to blame for that; across a network it is cut, once both have waited that long."""
    two = ranks()
    with two.beats[0].waiting("gradients"), two.beats[1].waiting("gradients"):
        assert two.after(3 * LIMIT) is None
    far = ranks("10.0.0.1", "10.0.0.2")
    with far.beats[0].waiting("gradients"):
        far.after(LIMIT - 10)
        with far.beats[1].waiting("gradients"):
            assert far.after(50) is None  # the other one has only just come
            said = far.after(LIMIT)
    assert said is not None
    assert "rank 0 has waited" in said
    assert "for rank 1 on node 10.0.0.2" in said
    assert "the network between the nodes is cut" in said
    assert far.hang.pids == set()


def test_a_process_that_was_stopped_in_a_wait(ranks: Callable[..., Ranks]) -> None:
    """Both wait, and one of them cannot answer: waits may lie inside each other."""
    two = ranks()
    asleep = subprocess.Popen(["sleep", "600"])
    try:
        two.beats[1].record["pid"] = asleep.pid
        two.alive.add(asleep.pid)
        with two.beats[0].waiting("gradients"), two.beats[1].waiting("gradients"):
            with two.beats[1].waiting("sums"):
                assert two.after(3 * LIMIT) is None
            asleep.send_signal(signal.SIGSTOP)
            said = two.after(LIMIT + 5)
    finally:
        asleep.kill()
        asleep.wait()
    assert said is not None
    assert said.startswith(
        "rank 1 hangs in train of step 7 (its process is stopped (SIGSTOP)); rank 0 has waited"
    )
    assert two.hang.pids == {asleep.pid}


def test_a_rank_of_another_node_hangs(ranks: Callable[..., Ranks]) -> None:
    two = ranks("10.0.0.1", "10.0.0.2")
    with two.beats[0].waiting("gradients"):
        said = two.after(LIMIT + 5)
    assert said is not None
    assert said.startswith("rank 1 on node 10.0.0.2 hangs in train of step 7; rank 0 has waited 101 s")
    assert two.hang.pids == set()


def test_records_that_are_half_there_are_passed_over(ranks: Callable[..., Ranks], tmp_path: Path) -> None:
    two = ranks()
    (tmp_path / "rank2.beat").write_text('{"rank": 2, "pi')
    (tmp_path / "rank3.beat").write_text("{}")
    assert [beat.rank for beat in read_beats(tmp_path)] == [0, 1]
    two.beats[0].at("a phase of a name " + "x" * 400)  # longer than a record: unreadable, not half read
    assert [beat.rank for beat in read_beats(tmp_path)] == [1]
