"""Rollouts of `hf` alone beside transformers' generate: 4 prompts x 8 responses of exactly 64 tokens a round.

    OMP_NUM_THREADS=1 python -m benchmarks.generate [--model DIR --data DIR] [--dtype DTYPE...] [--rounds N]

JSON lines {"name", "tokens_per_cpu_s", "rounds"}: the median over rounds, and every round. One process, the same
weights and prompts (prompts.jsonl of --data, through the chat template), each side in turn; the first round of each
warms up and is not counted. generate samples from the same distribution and returns no log-probabilities, ours does.
fuse_seconds: CPU seconds of the fused copy of the weights, which every round of ours makes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.workload import SEED, make_data, make_model

PROMPTS, SAMPLES, NEW = 4, 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not os.environ.get("OMP_NUM_THREADS"):
        parser.error("set OMP_NUM_THREADS: idle threads that spin would count as work")

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sides: dict[str, Callable[[int], None]] = {}
    fused: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, data = options.model, options.data
        if model is None:
            model = Path(scratch) / "model"
            make_model(model, 4096)
        if data is None:
            data = Path(scratch) / "data"
            make_data(model, data)
        asked = [json.loads(line)["prompt"] for line in (data / "prompts.jsonl").read_text().splitlines()]
        for dtype in options.dtype:
            sides[f"rlhfctl {dtype}"], fused[dtype] = rollouts(model, asked, dtype)
            sides[f"generate {dtype}"] = generations(model, asked, dtype)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name, side in sides.items():
            began = time.process_time()
            side(turn)
            if turn:
                rates[name].append(round(PROMPTS * SAMPLES * NEW / (time.process_time() - began), 1))
    for name, found in rates.items():
        print(json.dumps({"name": name, "tokens_per_cpu_s": statistics.median(found), "rounds": found}))
    for dtype in options.dtype:
        pairs = zip(rates[f"rlhfctl {dtype}"], rates[f"generate {dtype}"], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        facts = {"ratio": round(ratio, 2), "fuse_seconds": fused[dtype], "load": round(os.getloadavg()[0], 1)}
        print(json.dumps({"dtype": dtype} | facts))


def rollouts(model: Path, asked: list[str], dtype: str) -> tuple[Callable[[int], None], float]:
    """A round of ours, and the CPU seconds of fusing the weights."""
    import torch

    from rlhfctl.models.load import load_causal_lm
    from rlhfctl.models.tokenizer import policy_encoder
    from rlhfctl.recipe.sections import Policy
    from rlhfctl.rollout.decode import FusedWeights
    from rlhfctl.rollout.engine import HfEngine
    from rlhfctl.rollout.types import Request, Sampling

    spec = Policy.model_validate({"path": str(model), "dtype": dtype})
    encoder = policy_encoder(spec, lambda line: None)
    policy = load_causal_lm(spec, torch.device("cpu"), SEED)
    prompts = [encoder.encode_prompt([{"role": "user", "content": text}]) for text in asked]
    engine = HfEngine(policy)

    def one_round(turn: int) -> None:
        part = [prompts[(turn * PROMPTS + k) % len(prompts)] for k in range(PROMPTS)]
        requests = [Request(g * SAMPLES + k, ids) for g, ids in enumerate(part) for k in range(SAMPLES)]
        found = engine.generate(requests, Sampling(NEW, 1.0, 1.0, (), SEED, turn, 1 << 20))
        assert all(len(rollout.response_ids) == NEW for rollout in found)

    FusedWeights(policy)
    began = time.process_time()
    FusedWeights(policy)
    return one_round, round(time.process_time() - began, 4)


def generations(model: Path, asked: list[str], dtype: str) -> Callable[[int], None]:
    """A round of transformers' generate, its default attention and cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    kind = getattr(torch, dtype)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=kind, use_safetensors=True).eval()
    chats = [[{"role": "user", "content": text}] for text in asked]

    def one_round(turn: int) -> None:
        part = [chats[(turn * PROMPTS + k // SAMPLES) % len(chats)] for k in range(PROMPTS * SAMPLES)]
        inputs: Any = tokenizer.apply_chat_template(
            part, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        torch.manual_seed(turn)
        with torch.no_grad():
            policy.generate(**inputs, do_sample=True, top_k=0, min_new_tokens=NEW, max_new_tokens=NEW)

    return one_round


if __name__ == "__main__":
    main()
