"""The estimate of preflight/memory.py against what runs really take.

    python -m benchmarks.memory [--only NAME ...] [--quick]

One process a configuration: imports first, then the peak is reset, then a few steps of the trainer itself.
JSON lines memory/NAME: estimate_mb, peak_mb (VmHWM minus what was resident before the model), ratio. --quick: three.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SMALL, LARGE = 4096, 152064  # vocabularies
BASE = {"vocab": SMALL, "hidden": 512, "layers": 4, "inner": 1408, "tokens": 1024, "rows": 8}
WIDE = {"vocab": LARGE, "hidden": 128, "layers": 2, "inner": 384, "tokens": 1024, "rows": 8}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sft": {**BASE, "task": "sft"},
    "sft-one-pack": {**BASE, "task": "sft", "rows": 4},
    "sft-checkpointing": {**BASE, "task": "sft", "checkpointing": True, "tokens": 2048},
    "sft-lora": {**BASE, "task": "sft", "lora": True, "tokens": 2048},
    "sft-lora-checkpointing": {**BASE, "task": "sft", "lora": True, "checkpointing": True, "tokens": 2048},
    "sft-bfloat16": {**BASE, "task": "sft", "dtype": "bfloat16"},
    "sft-vocab": {**WIDE, "task": "sft"},
    "sft-vocab-tied": {**WIDE, "task": "sft", "tied": True},
    "sft-long-packs": {**BASE, "task": "sft", "tokens": 4096},
    "rm": {**BASE, "task": "rm"},
    "rm-lora-vocab": {**WIDE, "task": "rm", "lora": True, "hidden": 256},
    "ppo-grpo": {**BASE, "task": "ppo", "kl": 0.0, "advantage": "grpo"},
    "ppo-gae": {**BASE, "task": "ppo", "kl": 0.05, "advantage": "gae"},
    "ppo-vocab": {**WIDE, "task": "ppo", "kl": 0.05, "advantage": "grpo", "hidden": 96},
    "oreo": {**BASE, "task": "oreo"},
    "oreo-vocab": {**WIDE, "task": "oreo", "hidden": 96},
}
QUICK = ("sft", "sft-lora-checkpointing", "rm")
LENGTH = 256  # of every row
STEPS = 2


def write_home(home: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the quickstart's tokenizer, rows that fill data.max_length, and the recipe."""
    from rlhfctl.quickstart.chains import write_model

    write_model(home / "model")
    config = json.loads((home / "model/config.json").read_text())
    config |= {
        "vocab_size": spec["vocab"],
        "hidden_size": spec["hidden"],
        "num_hidden_layers": spec["layers"],
        "intermediate_size": spec["inner"],
        "num_attention_heads": spec["hidden"] // 32,
        "num_key_value_heads": spec["hidden"] // 64 or 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": spec.get("tied", False),
    }
    (home / "model/config.json").write_text(json.dumps(config))
    task = spec["task"]
    chain = "3+8=1\n" * 60
    answer = {"sft": "response", "oreo": "response"}.get(task)
    rows = []
    for n in range(spec["rows"]):
        text = chain[: 2 * (LENGTH - 24) // 2 - n % 2]
        row: dict[str, Any] = {"id": f"r{n}", "prompt": f"{n % 10}+1?"}
        if task == "rm":
            row |= {"chosen": text, "rejected": text[:-1] + "7"}
        elif task == "ppo":
            row |= {"prompt": "+".join(["3"] * 60) + "?", "label": "1"}
        else:
            row |= {answer or "response": text}
        if task == "oreo":
            row |= {"reward": float(n % 2)}
        rows.append(row)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "reward.py").write_text(
        "def score(samples):\n    return [float(len(s['response']) % 2) for s in samples]\n"
    )
    recipe: dict[str, Any] = {
        "task": task,
        "name": "memory",
        "policy": {
            "from_config": str(home / "model"),
            "tokenizer": str(home / "model"),
            "dtype": spec.get("dtype", "float32"),
            "gradient_checkpointing": spec.get("checkpointing", False),
        },
        "data": {"train": [{"path": str(home / "rows.jsonl")}], "max_length": LENGTH},
        "train": {"steps": STEPS, "batch_size": spec["rows"], "tokens_per_microbatch": spec["tokens"]},
    }
    if spec.get("lora"):
        recipe["policy"] |= {"lora": {"rank": 16}, "path": recipe["policy"].pop("from_config")}
    if task == "ppo":
        recipe |= {
            "reward": {"sources": [{"kind": "python", "path": str(home / "reward.py")}]},
            "rollout": {"n": 4, "max_new_tokens": 128},
            "algorithm": {"advantage": spec["advantage"], "kl_coef": spec["kl"]},
        }
    return recipe


def one(spec: dict[str, Any], home: Path) -> dict[str, Any]:
    """In this process: the trainer's steps, and its peak over what was there before."""
    import peft  # noqa: F401  imported by the trainer where there are adapters
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    from rlhfctl.preflight.memory import estimate
    from rlhfctl.recipe.tasks import TASKS
    from rlhfctl.run_dir import RunDir
    from rlhfctl.trainers import oreo, ppo, reward_model, sft
    from rlhfctl.trainers.context import RunContext

    trainers = {"sft": sft.train, "rm": reward_model.train, "ppo": ppo.train, "oreo": oreo.train}
    content = write_home(home, spec)
    recipe: Any = TASKS[spec["task"]].model_validate(content)
    config = json.loads((home / "model/config.json").read_text())
    found = estimate(recipe, config, spec.get("dtype") == "bfloat16")
    assert found is not None
    if spec.get("lora"):  # adapters stand on a checkpoint
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / "model")).save_pretrained(
            home / "model"
        )
    run = RunDir(home / "run")
    run.create()
    ctx = RunContext(recipe, run, 0, 1, torch.device("cpu"), False, 1, lambda: None, lambda said: None)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is resident
    before = status("VmRSS")
    trainers[spec["task"]](ctx)
    peak = status("VmHWM") - before
    mb = 2**20
    return {
        "estimate_mb": round(found.peak / mb),
        "peak_mb": round(peak / mb),
        "ratio": round(found.peak / peak, 3),
        "baseline_mb": round(before / mb),
        "parts_mb": {
            name: round(value / mb) for name, value in found.parts().items() if value and name != "peak"
        },
    }


def status(name: str) -> int:
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) * 1024


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", help="a configuration, run in this process")
    options = parser.parse_args(arguments)
    if options.one:
        with tempfile.TemporaryDirectory() as home:
            found = one(CONFIGURATIONS[options.one], Path(home))
        print(json.dumps({"name": f"memory/{options.one}", **found}), flush=True)
        return
    names = options.only or (QUICK if options.quick else CONFIGURATIONS)
    for name in names:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(json.dumps({"name": f"memory/{name}", "error": done.stderr.splitlines()[-1]}), flush=True)
            continue
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
