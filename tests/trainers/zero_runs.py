"""Runs of all tasks with and without DeepSpeed, one after the other in each process; started by test_zero.py.

`zero_runs.py DIR CHAINS RUNS.json`: RUNS.json lists [name, task, {key: value}, the step after which it is stopped and
resumed, or null]. Each run is in DIR/name: its metrics.jsonl and final/ are what a test compares.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import warnings
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from rlhfctl.errors import Interrupted
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers.context import RunContext
from rlhfctl.worker import TRAINERS

COMMON = """\
task: {task}
name: tiny
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
optim: {{lr: 1.0e-3, schedule: linear, warmup_ratio: 0, weight_decay: 0.1, max_grad_norm: 0.5}}
train: {{steps: 3, batch_size: 16, tokens_per_microbatch: 256}}
"""
ROLLOUTS = """\
data: {{train: [{{path: {chains}/data/prompts.jsonl, format: qa}}], max_length: 64}}
reward: {{sources: [{{kind: python, path: {here}/reward.py}}]}}
rollout: {{n: 2, max_new_tokens: 6}}
"""
SECTIONS = {
    "sft": "data: {{train: [{{path: {chains}/data/sft.jsonl}}], max_length: 128}}\n",
    "rm": "data: {{train: [{{path: {here}/pairs.jsonl}}], max_length: 128}}\n",
    "ppo": ROLLOUTS,
    "reft": ROLLOUTS + "warmup: {{steps: 2, epochs: null, batch_size: 16, lr: 1.0e-3}}\n",
    "oreo": "data: {{train: [{{path: {here}/trajectories.jsonl}}], max_length: 128}}\n",
}


def write_data(here: Path, chains: Path) -> None:
    (here / "reward.py").write_text(
        'def score(samples):\n    return [float(len(s["response"]) % 2) for s in samples]\n'
    )
    rows = [json.loads(line) for line in (chains / "data" / "sft.jsonl").read_text().splitlines()]
    pairs, scored = [], []
    for row, other in pairwise(rows):
        prompt, right, wrong = row["prompt"], row["response"], other["response"]
        pairs.append({"prompt": prompt, "chosen": right, "rejected": wrong})
        scored += [
            {"prompt": prompt, "response": right, "reward": 1.0},
            {"prompt": prompt, "response": wrong, "reward": 0.0},
        ]
    for name, lines in (("pairs", pairs), ("trajectories", scored)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(ctx: RunContext, stop_after: int | None) -> None:
    asked = iter([None] * ((stop_after or 0) - 1))
    if stop_after is not None:
        ctx.stop_signal = lambda: next(asked, signal.SIGINT)
    try:
        importlib.import_module(TRAINERS[ctx.recipe.task]).train(ctx)
    except Interrupted:
        assert stop_after is not None


def main(here: Path, chains: Path, runs: list) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    if rank == 0:
        write_data(here, chains)
    for name, task, keys, stop_after in runs:
        recipe_file = here / f"{name}.{rank}.yaml"
        recipe_file.write_text((COMMON + SECTIONS[task]).format(task=task, chains=chains, here=here))
        recipe = load_recipe(str(recipe_file), [f"{key}={value}" for key, value in keys.items()]).recipe
        run = RunDir(here / name)
        if rank == 0:
            shutil.rmtree(run.path, ignore_errors=True)
            run.create()
        dist.barrier()
        for resume, stop in [(False, stop_after), (True, None)] if stop_after else [(False, None)]:
            ctx = RunContext(recipe, run, rank, world, torch.device("cpu"), resume, 1, lambda: None, print)
            train(ctx, stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
