"""Readers of stderr that go away, flags that stand together, and outputs that the user named."""

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Cli


def started(tiny: list[str], tmp_path: Path, stderr: int, *more: str) -> "subprocess.Popen[str]":
    argv = [*COMMAND, "sft", "quickstart/sft", *tiny, "launch.threads=1", "--run-dir", "run", *more]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path)


def ended(process: "subprocess.Popen[str]", tmp_path: Path) -> str:
    """stdout of a run that went well to its end, whoever read its stderr."""
    out, _ = process.communicate(timeout=120)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (process.returncode, status["state"], status["step"], status["reason"]) == (0, "done", 3, None)
    log = (tmp_path / "run/logs/attempt_1/rank0.log").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    return out


@pytest.mark.parametrize("launcher", ["inline", pytest.param("torchrun", marks=pytest.mark.heavy)])
def test_a_run_whose_stderr_nobody_reads_any_more(tiny: list[str], tmp_path: Path, launcher: str) -> None:
    process = started(tiny, tmp_path, subprocess.PIPE, f"launch.launcher={launcher}", "--json")
    assert process.stderr is not None
    assert process.stderr.readline() == "run directory: run\n"
    process.stderr.close()
    process.stderr = None
    told = json.loads(ended(process, tmp_path))
    assert (told["status"], told["exit_code"], told["state"], told["step"]) == ("ok", 0, "done", 3)


def test_a_run_whose_terminal_is_closed(tiny: list[str], tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = started(tiny, tmp_path, slave)
    os.close(slave)
    assert os.read(master, 13) == b"run directory"
    os.close(master)
    assert ended(process, tmp_path) == "run\n"


def test_a_broken_pipe_of_a_commands_own_is_no_success() -> None:
    body = (
        "import sys, rlhfctl.cli.train as train\n"
        "from rlhfctl.cli.main import run\n"
        "def broken(*given):\n    raise BrokenPipeError(32, 'Broken pipe')\n"
        "train.train = broken\n"
        "sys.exit(run(['sft', 'a.yaml', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert (done.returncode, told["exit_code"], told["status"]) == (1, 1, "failed")
    assert told["message"].startswith("a bug in rlhfctl: BrokenPipeError: [Errno 32] Broken pipe")
    assert done.stderr == f"{told['message']}\n"


@pytest.mark.parametrize("flags", [("-nq",), ("-qn",), ("-n", "-q")])
def test_short_flags_that_stand_together(cli: Cli, tiny: list[str], flags: tuple[str, ...]) -> None:
    done = cli("sft", "quickstart/sft", *tiny, *flags)
    assert (done.code, done.err) == (0, "")


def test_verbose_among_short_flags(cli: Cli) -> None:
    plain, verbose = cli("sft", "nowhere.yaml", "-nq"), cli("sft", "nowhere.yaml", "-nqv", "-v")
    assert plain.err.count("\n") == 1
    assert "Traceback" in verbose.err


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "R").mkdir()
    (tmp_path / "R/recipe.yaml").write_text("task: sft\n")
    return tmp_path / "R"


def test_a_report_into_a_link_and_into_a_pipe(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, dangling, pipe = (tmp_path / name for name in ("link.html", "new.html", "pipe"))
    (tmp_path / "there/old.html").write_text("old")
    link.symlink_to("there/old.html")
    dangling.symlink_to("there/new.html")
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    for name in (link.name, dangling.name, pipe.name):
        assert cli("report", "R", "-o", name).out == f"{name}\n"
    reader.join(timeout=30)
    page = (tmp_path / "there/old.html").read_text()
    assert page.startswith("<!doctype html>")
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert pipe.is_fifo()
    assert (tmp_path / "there/new.html").read_text().startswith("<!doctype html>")
    assert [text[:15] for text in read] == ["<!doctype html>"]
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new.html", "old.html"]


def test_a_report_under_the_longest_name(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    assert cli("report", "R", "-o", "a" * 255).code == 0
    assert (tmp_path / ("a" * 255)).read_text().startswith("<!doctype html>")


LONG = "a" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("sft", LONG),
        ("sft", "quickstart/sft", "--run-dir", LONG),
        ("sft", "--resume", "--run-dir", LONG),
        ("eval", LONG),
        ("inspect-template", LONG),
        ("serve-rm", LONG),
        ("report", LONG),
        ("report", "R", "-o", LONG),
        ("doctor", "--verify-resume", LONG),
        ("sft", "quickstart/sft", f"policy.from_config={LONG}"),
        ("sft", "quickstart/sft", f"data.train.0.path={LONG}.jsonl"),
    ],
)
def test_a_name_that_no_file_can_have(cli: Cli, run_dir: Path, words: tuple[str, ...]) -> None:
    done = cli(*words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert LONG in done.err
    assert "too long" in done.err


def test_links_in_a_circle(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    done = cli("sft", "quickstart/sft", "data.train.0.path=loop")
    assert (done.code, done.out) == (2, "")
    assert "data.train.0.path: loop cannot be a file or a directory: its links go in a circle\n" in done.err
    done = cli("report", "R", "-o", "loop")
    assert (done.code, done.err) == (2, "cannot write loop: Too many levels of symbolic links\n")
    assert (tmp_path / "loop").is_symlink()


def test_a_long_override_of_a_resume_is_no_path(cli: Cli) -> None:
    done = cli("sft", "--resume", "--run-dir", "r", f"name={LONG}")
    assert (done.code, done.err) == (2, "there is no run in r to continue: start it without --resume\n")


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("sft", ""), "sft"),
        (("sft", "quickstart/sft", "--run-dir", ""), "--run-dir"),
        (("sft", "quickstart/sft", "--run-dir="), "--run-dir"),
        (("eval", ""), "eval"),
        (("report", "R", "-o", ""), "-o"),
    ],
)
def test_an_empty_argument(cli: Cli, words: tuple[str, ...], place: str) -> None:
    done = cli(*words, "--json")
    said = f"the argument after {place} is empty: give it a value, or leave it out"
    assert (done.object["message"], done.code, done.err) == (said, 2, f"{said}\n")


@pytest.mark.parametrize("key", ["policy.from_config", "data.train.0.path"])
def test_an_empty_path_in_a_recipe(cli: Cli, key: str) -> None:
    done = cli("sft", "quickstart/sft", f'{key}=""', "--json")
    (error,) = done.object["errors"]
    said = f"{key}: an empty path: name a file or directory, or leave the key out"
    assert (done.code, error["key"], error["message"]) == (2, key, said)
