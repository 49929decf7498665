"""The real command line in a subprocess, and the quickstart's model and data for the runs that really train."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "rlhfctl"]


@dataclass(frozen=True)
class Ended:
    """cpu: seconds of user and system time."""

    code: int
    out: str
    err: str
    cpu: float

    @property
    def object(self) -> dict[str, Any]:
        """The one object of --json: nothing else is on stdout."""
        assert self.out.count("\n") == 1
        parsed: dict[str, Any] = json.loads(self.out)
        assert parsed["schema"] == 1
        assert parsed["exit_code"] == self.code
        return parsed


Cli = Callable[..., Ended]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs rlhfctl in the temporary directory; never with a traceback unless one is asked for."""

    def run(*args: str, stdin: str = "", cwd: Path | None = None, **env: str) -> Ended:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [*COMMAND, *args],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=cwd or tmp_path,
            env={**os.environ, "COLUMNS": "80", **env},
            timeout=120,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        if not {"-v", "--verbose"} & set(args):
            assert "Traceback" not in done.stderr
        return Ended(done.returncode, done.stdout, done.stderr, cpu)

    return run


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model configuration and data."""
    path = tmp_path_factory.mktemp("chains")
    subprocess.run(
        [sys.executable, "-m", "rlhfctl.quickstart.chains", str(path)], check=True, capture_output=True
    )
    return path


@pytest.fixture(scope="session")
def tiny(chains: Path) -> list[str]:
    """Overrides of quickstart/sft for a run of seconds: three steps, no evaluation."""
    return [
        f"policy.from_config={chains}/model",
        f"policy.tokenizer={chains}/model",
        f"data.train=[{{path: {chains}/data/sft.jsonl, limit: 64}}]",
        "data.eval=[]",
        "reward=null",
        "rollout=null",
        "train.steps=3",
        "train.batch_size=4",
        "train.log_every=1",
    ]
