"""A quickstart working directory with an SFT policy, made once per session, and a way to run the real command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

VOLATILE = ("seconds/", "memory/", "tokens_per_second")


def run_cli(*arguments, cwd, check=True, env=None, timeout=300):
    """`rlhfctl ARGUMENTS` in its own process; the completed process with text streams."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhfctl", *arguments],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def read_metrics(run: Path):
    """The records of a run without what depends on time and machine."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(VOLATILE)}
        for line in lines
    ]


@pytest.fixture(scope="session")
def cli():
    return run_cli


@pytest.fixture(scope="session")
def metrics():
    return read_metrics


def rows(limit, **files):
    """data.train: so many rows of each of the quickstart's files; to prepare all of them takes longer than a run."""
    data = ".quickstart/data"
    parts = [f"{{path: {data}/{name}.jsonl, format: {kind}, limit: {limit}}}" for name, kind in files.items()]
    return f"[{', '.join(parts)}]"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """.quickstart/ with model, data and an sft run of 150 steps: enough to write answers that can be read. Runs write
    elsewhere: all processes of a suite share what the first one made."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workspace"
    with FileLock(f"{directory}.lock"):
        if not (directory / ".quickstart/sft/final").is_dir():
            make_workspace(directory)
    return directory


def make_workspace(directory):
    directory.mkdir(exist_ok=True)
    make = [sys.executable, "-m", "rlhfctl.quickstart.chains", ".quickstart", "--seed", "0"]
    subprocess.run(make, cwd=directory, check=True, capture_output=True)
    run_cli(
        "sft",
        "quickstart/sft",
        "--run-dir",
        ".quickstart/sft",
        "-q",
        "train.steps=150",
        "launch.threads=1",
        f"data.train={rows(6400, sft='prompt_response')}",
        "train.eval_samples=50",
        cwd=directory,
    )


RECIPES = {
    "sft": (
        "quickstart/sft",
        {"reward": "null", "rollout": "null", "data.train": rows(3000, sft="prompt_response")},
    ),
    "rm": ("quickstart/rm", {"data.train": rows(2500, pairs="preference", steps="stepwise")}),
    "ppo": ("quickstart/ppo", {"train.batch_size": 32}),
}


@pytest.fixture(scope="session")
def command():
    """command(task, run, {key: value}): the arguments of a run of 6 quick steps into the directory `run`."""

    def build(task, run, changes=None):
        recipe, own = RECIPES[task]
        keys = {"train.steps": 6, "train.log_every": 1, "data.eval": "[]", "launch.threads": 1}
        keys |= own | (changes or {})
        return [task, recipe, "-q", "--run-dir", str(run), *(f"{key}={value}" for key, value in keys.items())]

    return build
