"""The served page: what it answers, that it follows the run, and how it ends; the real command, and a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhfctl.report.watch import handler, tag_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "a"
    path.mkdir()
    (path / "recipe.yaml").write_text("task: ppo\nname: demo\n")
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.25}) + "\n")
    return path


@pytest.fixture
def served(run: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    argv = [sys.executable, "-m", "rlhfctl", "report", "--watch", str(run), "--port", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    timer = threading.Timer(60, process.kill)
    timer.start()
    yield process, process.stdout.readline().strip()
    timer.cancel()
    process.kill()
    process.communicate()


def get(address: str, **headers: str) -> tuple[int, str, str | None]:
    request = urllib.request.Request(address, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode(), reply.headers["ETag"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), None


def test_it_follows_the_run_and_ends_as_it_is_told(
    served: tuple[subprocess.Popen[str], str], run: Path
) -> None:
    process, address = served
    port = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)
    assert port is not None, address
    code, text, tag = get(address)
    assert (code, text.count("<polyline")) == (200, 1)
    assert tag is not None
    assert get(address, If_None_Match=tag)[0] == 304
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "reward/mean": 0.75, "kl/reference": 0.1}) + "\n")
    code, text, newer = get(address, If_None_Match=tag)
    assert (code, text.count("<polyline")) == (200, 2)
    assert newer != tag
    assert get(f"{address}etc/passwd")[0] == 404
    assert get(address, Host=f"evil.example:{port[1]}")[0] == 403
    assert get(address, Host="localhost")[0] == 200  # as of port 80
    (run / "recipe.yaml").rename(run / "gone")
    assert "is not a run directory" in get(address)[1]  # a sentence, and served on
    assert not list(run.glob("report.html"))
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [
        fields[1] for fields in listening if fields[1].endswith(f":{int(port[1]):04X}") and fields[3] == "0A"
    ]
    assert ours == [f"0100007F:{int(port[1]):04X}"]  # 127.0.0.1 alone: nobody outside this machine
    taken = subprocess.run(
        [sys.executable, "-m", "rlhfctl", "report", "--watch", ".", "--port", port[1]], capture_output=True, text=True,
        cwd=run.parent / "a",
    )  # fmt: skip
    assert (taken.returncode, taken.stdout) == (2, "")  # `gone`: no run any more
    (run / "gone").rename(run / "recipe.yaml")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err


def test_the_tag_follows_every_file_of_the_page(run: Path) -> None:
    tags = [tag_of([run])]
    (run / "first/eval").mkdir(parents=True)
    for name in ("samples.jsonl", "eval.json", "first/eval/eval.json", "first/eval/trees.jsonl"):
        (run / name).write_text("{}\n")
        tags.append(tag_of([run]))
    assert len(set(tags)) == 5


def test_a_port_in_use_and_options_that_do_not_fit(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, code, said in [
            (["--watch", "--port", port], 4, f"port {port} of 127.0.0.1 is in use"),
            (["--watch", "-o", "x.html"], 2, "remove -o, or --watch"),
            (["--port", port], 2, "--port is for --watch"),
        ]:
            argv = [sys.executable, "-m", "rlhfctl", "report", str(run), *words]
            ended = subprocess.run(argv, capture_output=True, text=True)
            assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (code, "", 1)
            assert said in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_it_ends_where_its_address_cannot_be_told(run: Path) -> None:
    argv = [sys.executable, "-m", "rlhfctl", "report", "--watch", str(run), "--port", "0"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 1
    assert "cannot write the result to stdout: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.heavy
def test_a_browser_follows_it(run: Path, tmp_path: Path) -> None:
    """The run moves on after the first answer; the page's own script must fetch what is new."""
    browser = shutil.which("chromium")
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is missing")
        pytest.skip("chromium is missing")
    asked: list[int] = []

    class Moving(handler([run])):  # type: ignore[misc]
        def do_GET(self) -> None:
            super().do_GET()
            asked.append(1)
            if len(asked) == 1:
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": 2, "reward/mean": 0.5, "kl/reference": 0.1}) + "\n")

    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'p'}",
    ]
    flags += ["--virtual-time-budget=9000", "--dump-dom", "--enable-logging=stderr"]
    with ThreadingHTTPServer(("127.0.0.1", 0), Moving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        seen = subprocess.run([browser, *flags, address], capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert seen.stdout.count("<polyline") == 2, seen.stdout
    assert len(asked) >= 3
    assert not re.search(r"CONSOLE.*(error|refused|failed)", seen.stderr, re.IGNORECASE)
