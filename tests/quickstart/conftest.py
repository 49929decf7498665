"""What the tests of whole runs share: a user's environment, and what a run has written."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Records = list[dict[str, float]]


@pytest.fixture(scope="session")
def environment(repo: Path) -> dict[str, str]:
    """rlhfctl on the path, and no number of threads: the launch chooses it."""
    keep = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return {
        **keep,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(repo),
    }


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], Records]:
    return lambda run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def ends(metrics: Callable[[Path], Records]) -> Callable[[Path], tuple[dict[str, float], dict[str, float]]]:
    """The first and the last evaluation of a run."""

    def first_and_last(run: Path) -> tuple[dict[str, float], dict[str, float]]:
        evaluations = [row for row in metrics(run) if "eval/accuracy" in row]
        return evaluations[0], evaluations[-1]

    return first_and_last
