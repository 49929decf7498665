"""Long lines of a terminal are wrapped between words; those of a pipe stay whole."""

import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

from rlhfctl.cli.console import hanging, table, terminal_width


def test_a_text_goes_on_where_it_began() -> None:
    rows = [("info  ", "one two three four five six"), ("warn  ", "short")]
    assert hanging(rows, 24) == ["info  one two three four", "      five six", "warn  short"]
    assert hanging(rows, None) == ["info  one two three four five six", "warn  short"]


def test_paths_stay_whole_and_a_sliver_of_a_terminal_gets_lines_as_they_are() -> None:
    path = "/a/path/that/is/longer/than/the/line"
    assert hanging([("info  ", f"read {path} today")], 30) == ["info  read", f"      {path}", "      today"]
    assert hanging([("info  ", "one two three four five six")], 12) == ["info  one two three four five six"]


def test_the_fix_of_a_finding_is_wrapped_too() -> None:
    found = table([("error", "D001", "no such file\nsecond line", "give one that is there, or none")], 40)
    assert found == [
        "error  D001  no such file",
        "             second line",
        "             fix: give one that is",
        "             there, or none",
    ]


def test_a_pipe_has_no_width_and_a_terminal_its_own(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        assert terminal_width(file) is None
    assert terminal_width(None) is None
    master, slave = pty.openpty()
    try:
        termios.tcsetwinsize(slave, (24, 60))
        argv = [sys.executable, "-m", "rlhfctl", "recipes", "list"]
        with subprocess.Popen(argv, stdout=slave, stderr=subprocess.DEVNULL, cwd=tmp_path) as process:
            told = b""
            while told.count(b"\n") < 10:
                assert select.select([master], [], [], 60)[0], told
                told += os.read(master, 4096)
            process.kill()
    finally:
        os.close(slave)
        os.close(master)
    shown = told.decode().splitlines()
    assert shown[0].startswith("gsm8k/against-rm")
    assert max(map(len, shown[:10])) <= 60
    assert shown[1].startswith(" " * 20)
