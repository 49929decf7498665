"""Rollouts of `hf` alone: 4 prompts x 8 responses of exactly 64 tokens a round, as a JSON line.

    python -m benchmarks.generate [--model DIR --data DIR] [--threads N] [--dtype float32|bfloat16] [--rounds N]

{"name", "tokens_per_cpu_s", "tokens_per_s", "peak_rss_mb", "tokens"} over all rounds, the first one included; prompts
go through the chat template. --model and --data (prompts.jsonl) let the same prompts be given to another tool.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from benchmarks.workload import SEED, make_data, make_model

PROMPTS, SAMPLES, NEW = 4, 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import torch

    from rlhfctl.models.load import load_causal_lm
    from rlhfctl.models.tokenizer import policy_encoder
    from rlhfctl.recipe.sections import Policy
    from rlhfctl.rollout.engine import HfEngine
    from rlhfctl.rollout.types import Request, Sampling

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model, data = options.model, options.data
        if model is None:
            model = Path(scratch) / "model"
            make_model(model, 4096)
        if data is None:
            data = Path(scratch) / "data"
            make_data(model, data)
        policy = Policy(path=str(model), dtype=options.dtype)
        encoder = policy_encoder(policy, lambda line: None)
        lines = (data / "prompts.jsonl").read_text().splitlines()
        prompts = [
            encoder.encode_prompt([{"role": "user", "content": json.loads(line)["prompt"]}]) for line in lines
        ]
        engine = HfEngine(load_causal_lm(policy, torch.device("cpu"), SEED))
    tokens, spent, began = 0, time.process_time(), time.perf_counter()
    for turn in range(options.rounds):
        asked = [prompts[(turn * PROMPTS + k) % len(prompts)] for k in range(PROMPTS)]
        requests = [Request(g * SAMPLES + k, ids) for g, ids in enumerate(asked) for k in range(SAMPLES)]
        rollouts = engine.generate(requests, Sampling(NEW, 1.0, 1.0, (), SEED, turn, 1 << 20))
        tokens += sum(len(rollout.response_ids) for rollout in rollouts)
    cpu, wall = time.process_time() - spent, time.perf_counter() - began
    result = {
        "name": "generate" if options.dtype == "float32" else f"generate-{options.dtype}",
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "tokens_per_s": round(tokens / wall, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "tokens": tokens,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
