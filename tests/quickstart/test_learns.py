"""The quickstart, run as a user runs it, learns what its recipes say."""

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.long]
Ends = Callable[[Path], tuple[dict[str, float], dict[str, float]]]


def test_quickstart(repo: Path, tmp_path: Path, environment: dict[str, str], ends: Ends) -> None:
    """The demonstrations teach about 23 %; the verifier's reward alone adds at least 40 points by ppo and by reft, and
    the steps are right too; oreo adds at least 25 offline. A reward model learned from pairs adds at least 10 to a
    policy of another vocabulary and template."""

    def quickstart() -> subprocess.CompletedProcess[str]:
        command = ["sh", str(repo / "recipes/quickstart/run.sh"), str(tmp_path / "out")]
        return subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)

    done = quickstart()
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows, blank, report = done.stdout.splitlines()[-10:]
    assert header.startswith("stage")
    assert [row.split()[:2] for row in rows] == [
        [task, "done"] for task in ("sft", "ppo", "reft", "oreo", "rm", "sft", "ppo")
    ]
    assert (blank, report) == ("", f"report: {tmp_path}/out/report.html")
    assert "sft-b" in (tmp_path / "out/report.html").read_text()
    first = ends(tmp_path / "out/ppo")[0]
    assert 0.1 < first["eval/accuracy"] < 0.4
    for run, gain in (("ppo", 0.4), ("reft", 0.4), ("oreo", 0.25)):
        after = ends(tmp_path / "out" / run)[1]
        for metric in ("eval/accuracy", "eval/path_accuracy"):
            assert after[metric] - first[metric] >= gain, (run, metric)
    assert "accuracy/greedy" in done.stdout
    before, after = ends(tmp_path / "out/rm")
    assert (before["eval/accuracy"], after["eval/length_accuracy"]) == (0.5, 0.5)
    assert after["eval/accuracy"] >= 0.8
    before, after = ends(tmp_path / "out/served-rm")
    assert after["eval/accuracy"] - before["eval/accuracy"] >= 0.1
    url = urlsplit((tmp_path / "out/serve-rm.url").read_text().strip())
    with socket.socket() as client:
        assert client.connect_ex((url.hostname, url.port)) != 0  # the service ended with the script
    again = quickstart()
    assert (again.returncode, again.stdout) == (0, done.stdout)
    said = again.stderr + (tmp_path / "out/beside.log").read_text()
    assert said.count("is done at step") == 7
