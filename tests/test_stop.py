"""A signal ends a loading run wherever it arrives, also where python swallows exceptions."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhfctl.errors import Interrupted
from rlhfctl.stop import StopRequest


class SignalledWhenFreed:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the handler runs between two of these
            pass


def test_a_signal_inside_a_destructor_arrives_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest(inline=True)

    def load() -> None:
        box = [SignalledWhenFreed()]
        box.clear()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.001)
        pytest.fail("the signal was lost")

    with stop.installed(), pytest.raises(Interrupted) as interrupted:
        load()
    assert interrupted.value.exit_code == 143
    assert capfd.readouterr().err == ""


def test_once_training_a_signal_is_only_noted() -> None:
    stop = StopRequest(inline=False)
    with stop.installed():
        assert stop.asked() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked() == signal.SIGINT


def test_a_ctrl_c_inside_an_executed_string_ends_with_the_exit_code(tmp_path: Path) -> None:
    """As one that arrives while a dataclass is made: python notes it, and would end by the signal."""
    (tmp_path / "interrupted.py").write_text("""
import sys
import rlhfctl.cli.main
def command():
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        sys.exit(130)
rlhfctl.cli.main.main = command
from rlhfctl.__main__ import main
main()
""")
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path)
    assert done.returncode == 130
