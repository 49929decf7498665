"""500 clients at a time, cut connections, and a server that is killed again and again: the benchmark, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
@pytest.mark.timed
def test_nothing_is_lost_or_mixed_up(repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve_rm", "--requests", "1000", "--rows", "1000"],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = {each["name"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert list(found) == [
        f"serve_rm/{name}"
        for name in (
            *("alone", "clients-16", "clients-64", "clients-500"),
            *("peer-1", "peer-16", "faults", "kills"),
        )
    ]
    assert {(each["lost"], each["wrong"]) for each in found.values()} == {(0, 0)}
    assert found["serve_rm/clients-500"]["requests"] == 1000
    assert found["serve_rm/clients-64"]["speedup"] > 1.5
    assert found["serve_rm/clients-64"]["less_cpu"] > 3
    assert found["serve_rm/faults"]["cut"] >= 5
    assert found["serve_rm/kills"]["kills"] >= 1
