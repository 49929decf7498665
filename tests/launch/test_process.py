"""The real torchrun agent over small scripts: console lines, signals once, no orphans, who failed first."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfctl.launch import process
from rlhfctl.launch.plan import make_plan
from rlhfctl.launch.process import (
    AgentResult,
    describe_exit,
    follow_file,
    killed_rank,
    noting_signals,
    run_agent,
)
from rlhfctl.launch.torchrun import torchrun_argv
from rlhfctl.preflight.devices import Machine
from rlhfctl.recipe.sections import Launch

BOX = Machine(cores=2, memory=1 << 33, gpus=(), torch_cuda=False)


def agent_argv(tmp_path: Path, body: str, processes: int = 2) -> list[str]:
    """torchrun over a module that is `body`; its command line carries the name the launcher looks for."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "scripted_worker.py").write_text(textwrap.dedent(body))
    plan = make_plan(Launch(nproc_per_node=processes, launcher="torchrun"), BOX, {})  # type: ignore[call-arg]
    argv = torchrun_argv(plan, "test", None)
    return [*argv, f"--log-dir={tmp_path}/torchrun", "-m", "scripted_worker", str(tmp_path), "rlhfctl.worker"]


def run(tmp_path: Path, body: str, processes: int = 2) -> tuple[AgentResult, str]:
    argv = agent_argv(tmp_path, body, processes)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "code")}
    stderr = io.StringIO()
    with noting_signals() as received:
        result = run_agent(argv, env, tmp_path / "agent.log", tmp_path / "console.log", stderr, [], received)
    return result, stderr.getvalue()


def after(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        if condition():
            action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_console_lines_reach_the_user(tmp_path: Path) -> None:
    result, stderr = run(
        tmp_path,
        """
        import os, sys
        print("noise")
        if os.environ["RANK"] == "0":
            with open(sys.argv[1] + "/console.log", "a") as console:
                console.write("step 1\\nstep 2\\n")
        """,
    )
    assert (result.returncode, result.signum) == (0, None)
    assert stderr == "step 1\nstep 2\n"


def test_a_reader_of_the_console_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    body = """
        import sys, time
        for step in range(3):
            with open(sys.argv[1] + "/console.log", "a") as console:
                console.write("step\\n")
            time.sleep(0.3)
        open(sys.argv[1] + "/end", "w").close()
    """
    argv = agent_argv(tmp_path, body, processes=1)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "code")}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stderr:
        result = run_agent(argv, env, tmp_path / "agent.log", tmp_path / "console.log", stderr, [], [])
    assert (result.returncode, result.signum) == (0, None)
    assert (tmp_path / "end").exists()


def test_a_signal_goes_to_each_worker_once_and_lets_it_finish(tmp_path: Path) -> None:
    body = """
        import os, signal, sys, time
        from pathlib import Path
        here, rank = Path(sys.argv[1]), os.environ["RANK"]
        got = []
        signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
        (here / f"ready{rank}").touch()
        while not got:
            time.sleep(0.02)
        time.sleep(1.0)  # the checkpoint at the step boundary
        (here / f"saved{rank}").write_text(str(len(got)))
    """
    ready = [tmp_path / "ready0", tmp_path / "ready1"]
    thread = after(lambda: all(path.exists() for path in ready), lambda: os.kill(os.getpid(), signal.SIGINT))
    result, stderr = run(tmp_path, body)
    thread.join()
    assert (result.returncode, result.signum) == (0, signal.SIGINT)
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert stderr.count("\n") == 1
    assert "once more kills" in stderr


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    body = """
        import os, signal, sys, time
        from pathlib import Path
        signal.signal(signal.SIGTERM, lambda number, frame: Path(sys.argv[1], "asked").touch())
        Path(sys.argv[1], "pid").write_text(str(os.getpid()))
        Path(sys.argv[1], "ready").touch()
        while True:
            time.sleep(1)
    """
    first = after((tmp_path / "ready").exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    second = after((tmp_path / "asked").exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    result, _ = run(tmp_path, body, processes=1)
    first.join()
    second.join()
    assert result.signum == signal.SIGTERM
    assert time.monotonic() - began < 60
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_agent_that_waits_without_workers_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of several nodes does with restarts left: its worker ends on the signal, and it waits for the others."""
    monkeypatch.setattr(process, "PATIENCE", 1.0)
    worker = "import signal, sys; print(flush=True); sys.exit(signal.sigwait([signal.SIGTERM]))"
    agent = f"""
import signal, subprocess, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
worker = subprocess.Popen([sys.executable, "-c", {worker!r}, "rlhfctl.worker"], stdout=subprocess.PIPE)
worker.stdout.readline()
open({str(tmp_path / "ready")!r}, "w").close()
worker.wait()
time.sleep(30)
"""
    thread = after((tmp_path / "ready").exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    with noting_signals() as received:
        result = run_agent(
            [sys.executable, "-c", agent],
            dict(os.environ),
            tmp_path / "agent.log",
            tmp_path / "console.log",
            io.StringIO(),
            [],
            received,
        )
    thread.join()
    assert (result.returncode, result.signum) == (-signal.SIGKILL, signal.SIGTERM)
    assert time.monotonic() - began < 60


def gone(pid: int) -> bool:
    """Whether the process ended (or is a zombie that nobody waits for); waits a little."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_rank_is_named_by_torchruns_words(tmp_path: Path) -> None:
    result, _ = run(
        tmp_path,
        """
        import os, signal, time
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
        """,
    )
    assert result.returncode == 1
    killed = killed_rank(tmp_path / "agent.log")
    assert killed is not None
    assert killed[:2] == (1, -signal.SIGKILL)
    assert "SIGKILL" in describe_exit(-signal.SIGKILL)
    assert "exit code 3" in describe_exit(3)


LAUNCHER = """
import io, os, sys
from pathlib import Path
from rlhfctl.launch.process import run_agent
argv, here = sys.argv[2:], Path(sys.argv[1])
env = {**os.environ, "PYTHONPATH": str(here / "code")}
run_agent(argv, env, here / "agent.log", here / "console.log", io.StringIO(), [], [])
"""


def test_nothing_outlives_a_killed_launcher(tmp_path: Path) -> None:
    body = """
        import ctypes, os, signal, sys, time
        from pathlib import Path
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        Path(sys.argv[1], "pids").write_text(f"{os.getpid()} {os.getppid()}")
        Path(sys.argv[1], "ready").touch()
        time.sleep(600)
    """
    argv = agent_argv(tmp_path, body, processes=1)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path), *argv])
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    for pid in (tmp_path / "pids").read_text().split():
        assert gone(int(pid))


def test_following_a_file_yields_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "console"
    follow = follow_file(path)
    assert next(follow) is None
    path.write_text("one\ntw")
    assert [next(follow), next(follow)] == ["one\n", None]
    with open(path, "a") as file:
        file.write("o\nthree\n")
    assert [next(follow), next(follow), next(follow)] == ["two\n", "three\n", None]


@pytest.mark.parametrize("text", ["", "Traceback (most recent call last):\nboom"])
def test_nobody_was_killed_in_other_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    assert killed_rank(tmp_path / "log") is None


PEERS = """
    # A launcher that looks at its workers as seldom as DeepSpeed's: both are dead before it does.
    import subprocess, sys, time
    said = sys.argv[1] + "/pid"
    wait = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)"
    code = {
        "lost": f"import os, sys, time\\n{wait}\\ntime.sleep(0.5)\\nexit(1)",
        "killed": "import os, sys\\nwith open(sys.argv[1], 'w') as said: said.write(str(os.getpid()))\\n"
        "os.kill(os.getpid(), 9)",
        "stopped": "import os\\nos.kill(os.getpid(), 15)",
        "done": "",
    }
    workers = [subprocess.Popen([sys.executable, "-c", code[name], said]) for name in sys.argv[2:]]
    time.sleep(3)
    code = max(abs(worker.wait()) for worker in workers)
    time.sleep(0.3)  # what is told was seen before
    sys.exit(code)
"""


@pytest.mark.parametrize(
    ("names", "code"), [(["lost", "done", "killed"], -9), (["stopped", "done"], None), (["done"], None)]
)
def test_the_first_death_is_seen_before_the_launcher_looks(
    tmp_path: Path, names: list[str], code: int | None
) -> None:
    (tmp_path / "launcher.py").write_text(textwrap.dedent(PEERS))
    argv = [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path), *names]
    result = run_agent(
        argv, dict(os.environ), tmp_path / "agent.log", tmp_path / "console.log", io.StringIO(), [], []
    )
    assert result.death == (None if code is None else (int((tmp_path / "pid").read_text()), code))
