"""`make bench`: our side as JSON lines {"name", "tokens_per_cpu_s", "tokens_per_s", "peak_rss_mb", "tokens"}.

    python -m benchmarks [NAME...] [--model DIR --data DIR] [--threads N] [--dtype float32|bfloat16] [--repeat N]

Each workload is one `rlhfctl` run in its own process; figures are read from its metrics.jsonl: tokens over the CPU
seconds of all training steps (start-up, loading and tokenising excluded), and the process's peak memory. --model (with
MODEL-rm beside it) and --data let the same model and rows be given to another tool.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.workload import make_data, make_model_apart

SFT = """
task: sft
name: bench-sft
policy: {{path: {model}, dtype: {dtype}}}
data: {{train: [{{path: {data}/sft.jsonl, format: prompt_response, limit: {rows}}}], max_length: 512, shuffle: true}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{epochs: 1, batch_size: {batch}, tokens_per_microbatch: 1024}}
launch: {{threads: {threads}}}
"""

RL = """
task: ppo
name: bench-{name}
policy: {{path: {model}, dtype: {dtype}}}
data: {{train: [{{path: {data}/prompts.jsonl, format: prompt_response}}], max_length: 512}}
reward: {{sources: [{reward}]}}
rollout: {{n: {n}, max_new_tokens: 64}}
algorithm: {{{algorithm}}}
optim: {{lr: 1.0e-4, schedule: constant, warmup_ratio: 0}}
train: {{steps: 5, batch_size: 32, tokens_per_microbatch: 1024}}
launch: {{threads: {threads}}}
"""

RM = """
task: rm
name: bench-rm
policy: {{path: {model}-rm, dtype: {dtype}}}
algorithm: {{objective: pairwise}}
data: {{train: [{{path: {data}/pref.jsonl, format: preference, limit: {rows}}}], max_length: 512, shuffle: true}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{epochs: 1, batch_size: {batch}, tokens_per_microbatch: 1024}}
launch: {{threads: {threads}}}
"""

MODEL_REWARD = "{{kind: model, path: {model}-rm}}"
LENGTH_REWARD = "{{kind: python, path: {here}/reward.py}}"

WORKLOADS = {
    "sft": (SFT, {"rows": 256, "batch": 7}),
    "sft-bigvocab": (SFT, {"rows": 32, "batch": 7}),
    "rm": (RM, {"rows": 96, "batch": 8}),
    "ppo": (RL, {"n": 1, "reward": MODEL_REWARD, "algorithm": "advantage: gae, kl_coef: 0.05"}),
    "ppo-groups": (RL, {"n": 8, "reward": MODEL_REWARD, "algorithm": "advantage: gae, kl_coef: 0.05"}),
    "grpo": (RL, {"n": 8, "reward": LENGTH_REWARD, "algorithm": "advantage: grpo, kl_coef: 0"}),
    "rloo": (RL, {"n": 8, "reward": LENGTH_REWARD, "algorithm": "advantage: rloo, kl_coef: 0.05"}),
}


def run(
    name: str, options: argparse.Namespace, model: Path, data: Path, overrides: Sequence[str] = ()
) -> dict[str, object]:
    """One run of a workload. overrides: KEY=VALUE changes of its recipe."""
    recipe, values = WORKLOADS[name]
    filled = {"model": model, "here": Path(__file__).parent, "name": name, "threads": options.threads}
    filled |= {"data": data, "dtype": options.dtype, **values}
    if "reward" in values:
        filled["reward"] = str(values["reward"]).format(**filled)
    with tempfile.TemporaryDirectory() as scratch:
        path, directory = Path(scratch) / "recipe.yaml", Path(scratch) / "run"
        path.write_text(recipe.format(**filled))
        task = {SFT: "sft", RM: "rm"}.get(recipe, "ppo")
        command = [sys.executable, "-m", "rlhfctl", task, str(path), *overrides, "--run-dir"]
        command += [str(directory), "-q"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed with exit code {done.returncode}:\n{done.stderr}")
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    cpu = sum(record["seconds/cpu"] for record in records)
    wall = sum(record["seconds/step"] for record in records)
    tokens = records[-1]["tokens"]
    return {
        "name": name if options.dtype == "float32" else f"{name}-{options.dtype}",
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "tokens_per_s": round(tokens / wall, 1),
        "peak_rss_mb": round(records[-1]["memory/peak_rss_mb"], 1),
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--model", type=Path, help="model directory; MODEL-rm beside it is the reward model")
    parser.add_argument("--bigvocab", type=Path, help="the model of sft-bigvocab")
    parser.add_argument("--data", type=Path, help="directory with sft.jsonl, pref.jsonl and prompts.jsonl")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}: one of {', '.join(WORKLOADS)}")
    with tempfile.TemporaryDirectory() as scratch:
        small, large, data = options.model, options.bigvocab, options.data
        names = options.names or list(WORKLOADS)
        if small is None:
            small = Path(scratch) / "model"
            make_model_apart(small, 4096)
        if large is None and "sft-bigvocab" in names:
            large = Path(scratch) / "model-bigvocab"
            make_model_apart(large, 151_936)
        if data is None:
            data = Path(scratch) / "data"
            make_data(small, data)
        for _ in range(options.repeat):
            for name in names:
                print(
                    json.dumps(run(name, options, large if name == "sft-bigvocab" else small, data)),
                    flush=True,
                )


if __name__ == "__main__":
    main()
