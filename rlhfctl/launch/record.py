"""launch.json: what was started, where and with which versions, so that a run can be told from another later."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rlhfctl
from rlhfctl.launch.plan import Plan
from rlhfctl.preflight.devices import Machine
from rlhfctl.run_dir import RunDir, write_text

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "datasets",
    "numpy",
    "math-verify",
    "deepspeed",
)
# Only variables that change what is computed or where; anything else may hold a secret.
ENVIRONMENT = re.compile(
    r"(DS|OMP|GOMP|KMP|MKL|OPENBLAS|NCCL|GLOO|CUBLAS|CUDNN|TORCH|PYTORCH|TORCHINDUCTOR|TRITON)_\w+"
    r"|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|TOKENIZERS_PARALLELISM|HF_HUB_OFFLINE|HF_HOME"
    r"|TRANSFORMERS_OFFLINE|PYTHONHASHSEED|PYTHONPATH|LD_PRELOAD|LD_LIBRARY_PATH|RLHFCTL_\w+"
    r"|SLURM_(JOB_ID|NODEID|PROCID|NNODES|NTASKS)"
)
SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def write_launch(
    run: RunDir, plan: Plan, machine: Machine, attempt: int, command: list[str], inputs: Mapping[str, str]
) -> None:
    """Write launch.json, and a copy beside the attempt's logs. command: what was started; [] for inline. inputs: path
    to sha256 (launch/inputs.py)."""
    record = {
        "schema": 1,
        "attempt": attempt,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "command": command,
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "host": platform.node(),
        "launcher": plan.launcher,
        "device": plan.device,
        "processes_per_node": plan.processes,
        "nnodes": plan.nnodes,
        "threads": plan.threads,
        "env": recorded_environment({**os.environ, **plan.env}),
        "versions": versions(),
        "git": git_state(Path(rlhfctl.__file__).resolve().parent.parent),
        "machine": asdict(machine),
        "inputs": inputs,
    }
    text = json.dumps(record, indent=1) + "\n"
    write_text(run.attempt(attempt) / "launch.json", text, durable=False)
    write_text(run.launch, text, durable=False)


def read_launch(run: RunDir) -> dict[str, Any]:
    """The last attempt's launch.json, or {}."""
    try:
        record = json.loads(run.launch.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def changes_since(before: dict[str, Any], plan: Plan) -> list[str]:
    """What differs from the last attempt and can change the numbers of a resumed run."""
    if not before:
        return []
    world = before.get("processes_per_node", 1) * before.get("nnodes", 1)
    pairs = [
        ("threads per process", before.get("threads"), plan.threads),
        ("processes", world, plan.world),
        ("device", before.get("device"), plan.device),
        ("torch", before.get("versions", {}).get("torch"), versions().get("torch")),
        ("transformers", before.get("versions", {}).get("transformers"), versions().get("transformers")),
    ]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old is not None and old != new]


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(environ.items())
        if ENVIRONMENT.fullmatch(name) and not SECRET.search(name)
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "rlhfctl": rlhfctl.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Commit and cleanliness of the code that runs, or None where it is an installed package or git is absent."""
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
