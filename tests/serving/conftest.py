"""Real services on loopback, each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

# The score says which sample it belongs to, so that a mix-up cannot go unseen.
RULES = """
import time

def score(samples):
    found = []
    for sample in samples:
        metadata = sample["metadata"]
        if "sleep" in metadata:
            time.sleep(metadata["sleep"])
        if metadata.get("raise"):
            raise ValueError("asked to")
        if "none" in metadata:
            found.append(None)
            continue
        entry = {"score": float(metadata.get("n", len(sample["response"]))), "metrics": {"batch": len(samples)}}
        if "spans" in metadata:
            entry["spans"] = metadata["spans"]
        found.append(entry)
    return found
"""


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    started: dict[str, Any]

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def ask(self, *samples: dict[str, Any], **more: Any) -> httpx.Response:
        return self.post("/v1/rewards", json={"schema": 1, "samples": list(samples), **more})

    def metric(self, line: str) -> float:
        found = [
            row for row in httpx.get(f"{self.url}/metrics").text.splitlines() if row.startswith(f"{line} ")
        ]
        return float(found[0].split()[1]) if found else 0.0


Start = Callable[..., Service]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(source, *options, **environment): a service that answers already."""
    running: list[subprocess.Popen[str]] = []
    log = tmp_path_factory.mktemp("services") / "stderr"

    def run(source: str | Path, *options: str, port: int = 0, **environment: str) -> Service:
        command = [
            sys.executable,
            "-m",
            "rlhfctl",
            "serve-rm",
            str(source),
            "--port",
            str(port),
            "--json",
            *options,
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
            env={**os.environ, **environment},
        )
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        started = json.loads(line)
        return Service(process, started["url"], started)

    yield run
    for process in running:
        if process.poll() is None:
            process.terminate()
    for process in running:
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.py"
    path.write_text(RULES)
    return path


@pytest.fixture(scope="module")
def service(start: Start, rules: Path) -> Service:
    return start(rules)


def row(identity: str = "a", response: str = "four", **metadata: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "2+2?"}]
    return {"id": identity, "messages": messages, "response": response, "label": "4", "metadata": metadata}


@pytest.fixture(scope="session")
def sample() -> Callable[..., dict[str, Any]]:
    """sample(id, response, **metadata)"""
    return row
