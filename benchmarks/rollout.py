"""Rollouts by hf, vllm and vllm_server side by side: generated tokens per CPU-second, same weights and prompts.

    python -m benchmarks.rollout [--prompts N] [--samples N] [--new N] [--dtype float32|bfloat16] [--repeat N]

JSON lines. One process, rounds of all engines in turn; the first round of each warms up and is not counted. CPU seconds
are those of this process with all its threads, and for vllm_server those of its server's processes on top. sync: CPU
seconds of one weight sync with its canary.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.workload import SEED, make_model

VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if not os.environ.get("OMP_NUM_THREADS"):
        parser.error("set OMP_NUM_THREADS: idle threads that spin would count as work")

    import torch

    from rlhfctl.models.load import load_causal_lm
    from rlhfctl.recipe.sections import Policy, Rollout
    from rlhfctl.rollout.engine import build_engine
    from rlhfctl.rollout.types import Request, Sampling

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory) / "model", VOCABULARY)
        policy = load_causal_lm(
            Policy(path=f"{directory}/model", dtype=options.dtype), torch.device("cpu"), SEED
        )
    draw = random.Random(SEED)
    prompts = [
        [draw.randrange(VOCABULARY) for _ in range(draw.randint(16, 128))] for _ in range(options.prompts)
    ]
    requests = [
        Request(place * options.samples + k, prompt)
        for place, prompt in enumerate(prompts)
        for k in range(options.samples)
    ]
    engines: dict[str, Any] = {
        name: build_engine(Rollout(engine=name), policy, max_length=256)
        for name in ("hf", "vllm", "vllm_server")
    }
    tokens = dict.fromkeys(engines, 0)
    spent, sync, wall = (dict.fromkeys(engines, 0.0) for _ in range(3))
    for turn in range(options.repeat + 1):
        sampling = Sampling(options.new, 1.0, 1.0, (2,), SEED, turn, 1 << 20)
        for name, engine in engines.items():
            began = cpu_seconds(engine)
            engine.sync(policy, turn)
            synced, clock = cpu_seconds(engine), time.perf_counter()
            rollouts = engine.generate(requests, sampling)
            if turn:
                wall[name] += time.perf_counter() - clock
                spent[name] += cpu_seconds(engine) - synced
                sync[name] += synced - began
                tokens[name] += sum(len(rollout.response_ids) for rollout in rollouts)
    for name in engines:
        line = {
            "name": f"rollout-{name}",
            "dtype": options.dtype,
            "rows": len(requests),
            "tokens": tokens[name],
            "tokens_per_cpu_s": round(tokens[name] / spent[name], 1),
            "seconds": round(wall[name] / options.repeat, 3),
            "sync_cpu_s": round(sync[name] / options.repeat, 3),
        }
        print(json.dumps(line), flush=True)
    for engine in reversed(engines.values()):
        engine.close()


def cpu_seconds(engine: Any) -> float:
    """Of this process, and of the sessions of the servers that the engine has started."""
    return time.process_time() + sum(
        session_seconds(server.process.pid) for server in getattr(engine, "started", [])
    )


def session_seconds(session: int) -> float:
    """User and system time of the living processes of a session, to the clock's tick of mostly 10 ms."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
