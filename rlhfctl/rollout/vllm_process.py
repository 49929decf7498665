"""Servers that a run starts itself: `vllm serve` of the policy's architecture with random weights, one log each.

They listen on the loopback address only, since whoever reaches them may replace their weights.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from rlhfctl.errors import Unable
from rlhfctl.recipe.rollout_server import RolloutServer
from rlhfctl.rollout.guardian import GRACE, LAST, stop_with_run
from rlhfctl.rollout.handshake import EXTENSION

ADDRESS = "127.0.0.1"
# Of torchrun's workers; vLLM would take them for its own.
FOREIGN = re.compile(r"^(RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|TORCH_NCCL_)")
ERROR = re.compile(r"(?:^|\s)((?:[A-Za-z_.]+(?:Error|Exception))\b: .+)$")


@dataclass(frozen=True, slots=True)
class Shape:
    """What every server of a run is started with. threads: of each server on a CPU; gpus: the device of each, [] on a
    CPU."""

    model: Path
    dtype: str
    max_length: int
    cache_bytes: int
    trust_remote_code: bool
    threads: int
    gpus: tuple[str, ...]


@dataclass(slots=True)
class Started:
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def stop(self) -> None:
        """Ends the server and what it started; returns when they are gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(GRACE + LAST + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError):  # what a guardian that was killed has left
            os.killpg(self.process.pid, signal.SIGKILL)


def start(spec: RolloutServer, shape: Shape, logs: Path) -> list[Started]:
    """All servers, side by side, each answering. Raises Unable where one does not come up; none is left then."""
    started: list[Started] = []
    try:
        for place in range(spec.count):
            started.append(launch(spec, shape, place, logs / f"rollout_server_{place}.log"))
        wait_for(started, spec.start_timeout)
    except BaseException:
        for server in started:
            server.stop()
        raise
    return started


def launch(spec: RolloutServer, shape: Shape, place: int, log: Path) -> Started:
    port = spec.port + place if spec.port else free_port()
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhfctl.rollout.guardian", *argv(shape, port)],
            env=environment(shape, place),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a Ctrl-C in the terminal is the run's to answer
            preexec_fn=stop_with_run,
        )
    return Started(f"http://{ADDRESS}:{port}", process, log)


def argv(shape: Shape, port: int) -> list[str]:
    """The command line; `vllm serve` is this module under another name, which the CPU build's script cannot find."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(shape.model), "--skip-tokenizer-init", "--load-format", "dummy"),
        *("--dtype", shape.dtype, "--max-model-len", str(shape.max_length)),
        *("--kv-cache-memory-bytes", str(shape.cache_bytes), "--enforce-eager"),
        *("--enable-scale-out", "--worker-extension-cls", EXTENSION),
        # vLLM's default is the distribution before the temperature.
        *("--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"),
        *([] if shape.gpus else ["--no-enable-chunked-prefill"]),
        *("--max-num-batched-tokens", str(max(4096, shape.max_length))),
        *("--host", ADDRESS, "--port", str(port), "--disable-uvicorn-access-log"),
        *(["--trust-remote-code"] if shape.trust_remote_code else []),
    ]


def environment(shape: Shape, place: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    paths = [str(Path(__file__).parents[2]), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes of weight updates
        "PYTHONPATH": os.pathsep.join(paths),  # of the worker extension
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    kept.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if shape.gpus:
        return kept | {"CUDA_VISIBLE_DEVICES": shape.gpus[place]}
    cores = sorted(os.sched_getaffinity(0))
    mine = [cores[(place * shape.threads + k) % len(cores)] for k in range(min(shape.threads, len(cores)))]
    kept |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": str(shape.threads)}
    kept["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in mine)
    return kept


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def wait_for(servers: list[Started], seconds: float) -> None:
    ends = time.monotonic() + seconds
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        for server in servers:
            while not answers(client, server.url):
                if server.process.poll() is not None:
                    raise Unable(f"the rollout server did not start: {last_error(server.log)}")
                if time.monotonic() > ends:
                    raise Unable(
                        f"the rollout server did not answer within rollout.server.start_timeout ({seconds:g} s); its "
                        f"log: {server.log}"
                    )
                time.sleep(0.2)


def answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def last_error(log: Path) -> str:
    """The first exception that the log ends with, and where it lies: later ones are mostly its consequences."""
    lines = log.read_text(errors="replace").splitlines()
    found = [match[1] for line in lines if (match := ERROR.search(line))]
    return f"{found[0]} (log: {log})" if found else f"see {log}"
