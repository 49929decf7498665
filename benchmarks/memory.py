"""The estimate of preflight/memory.py against what runs really take.

    python -m benchmarks.memory [--only NAME ...] [--quick]

Processes of its own for a configuration: imports first, then the peak is reset, then a few steps of the trainer itself.
JSON lines memory/NAME: estimate_mb, peak_mb (VmHWM minus what was resident before the model; of several ranks the
largest), ratio. --quick: three. --set: all, fitted (CONFIGURATIONS), or fresh, zero, quantized, offloaded, which no
part of the estimate was fitted to.
"""

import argparse
import ctypes
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.ranks import forget_peak, memory, on_ranks, set_up

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
# Other widths, depths, head shares, vocabularies, lengths and batches than above.
FRESH: dict[str, dict[str, Any]] = {
    "fresh-wide": {"vocab": 32000, "hidden": 768, "layers": 2, "inner": 2048, "tokens": 1536, "rows": 12},
    "fresh-deep": {
        "vocab": 8192,
        "hidden": 256,
        "layers": 12,
        "inner": 704,
        "tokens": 2048,
        "rows": 8,
        "length": 512,
    },
    "fresh-tied-bfloat16": {
        "vocab": 49152,
        "hidden": 384,
        "layers": 4,
        "inner": 1024,
        "tokens": 3072,
        "rows": 24,
    },
    "fresh-checkpointing": {
        "vocab": 16384,
        "hidden": 448,
        "layers": 8,
        "inner": 1216,
        "tokens": 3072,
        "rows": 12,
    },
    "fresh-lora": {"vocab": 32000, "hidden": 640, "layers": 5, "inner": 1728, "tokens": 1024, "rows": 16},
    "fresh-rm": {
        "vocab": 16384,
        "hidden": 384,
        "layers": 6,
        "inner": 1024,
        "tokens": 2048,
        "rows": 8,
        "length": 320,
    },
    "fresh-grpo": {"vocab": 16384, "hidden": 320, "layers": 6, "inner": 896, "tokens": 2048, "rows": 16},
    "fresh-gae": {"vocab": 8192, "hidden": 384, "layers": 5, "inner": 1024, "tokens": 1536, "rows": 8},
    "fresh-oreo": {"vocab": 16384, "hidden": 320, "layers": 6, "inner": 896, "tokens": 1536, "rows": 8},
    "fresh-large-tensors": {
        "vocab": 4096,
        "hidden": 512,
        "layers": 2,
        "inner": 2816,
        "tokens": 4096,
        "rows": 16,
    },
    "fresh-lora-gae": {"vocab": 16384, "hidden": 448, "layers": 5, "inner": 1216, "tokens": 1536, "rows": 8},
    "fresh-prime": {"vocab": 8192, "hidden": 320, "layers": 5, "inner": 896, "tokens": 1536, "rows": 8},
}
FRESH["fresh-tied-bfloat16"] |= {"dtype": "bfloat16", "tied": True}
FRESH["fresh-checkpointing"] |= {"checkpointing": True}
FRESH["fresh-lora"] |= {"lora": True}
FRESH["fresh-rm"] |= {"task": "rm"}
FRESH["fresh-grpo"] |= {"task": "ppo", "kl": 0.05, "advantage": "grpo"}
FRESH["fresh-gae"] |= {"task": "ppo", "kl": 0.05, "advantage": "gae"}
FRESH["fresh-oreo"] |= {"task": "oreo"}
FRESH["fresh-lora-gae"] |= {"task": "ppo", "kl": 0.05, "advantage": "gae", "lora": True}
FRESH["fresh-prime"] |= {"task": "ppo", "kl": 0.0, "advantage": "prime"}
# Two gloo processes: the plain engine and each stage.
TWO = {"vocab": 8192, "hidden": 512, "layers": 4, "inner": 1408, "tokens": 1024, "rows": 8, "world": 2}
ZERO: dict[str, dict[str, Any]] = {
    "two-plain": TWO,
    **{f"two-zero-{stage}": {**TWO, "zero": stage} for stage in range(4)},
    "two-zero-2-bfloat16": {**TWO, "zero": 2, "dtype": "bfloat16"},
    "two-rm-zero-2": {**TWO, "zero": 2, "task": "rm"},
    "two-gae-zero-3": {**TWO, "zero": 3, "task": "ppo", "kl": 0.05, "advantage": "gae"},
    "two-lora-zero-3": {**TWO, "zero": 3, "lora": True},
}
# Frozen matrices in 8 and 4 bits under an adapter.
DEEP = {"vocab": 8192, "hidden": 768, "layers": 8, "inner": 2048, "tokens": 1024, "rows": 8, "lora": True}
QUANTIZED: dict[str, dict[str, Any]] = {
    "lora-float32": DEEP,
    **{f"lora-{kind}": {**DEEP, "quantization": kind} for kind in ("int8", "nf4")},
    "lora-nf4-bfloat16": {**DEEP, "quantization": "nf4", "dtype": "bfloat16"},
    "lora-nf4-grpo": {**DEEP, "quantization": "nf4", "task": "ppo", "kl": 0.05, "advantage": "grpo"},
}
# The optimizer, or parameters too, kept and stepped in CPU memory.
OFFLOADED: dict[str, dict[str, Any]] = {
    "offload-zero-1": {**TWO, "world": 1, "zero": 1, "offload": "optimizer"},
    "offload-zero-2": {**TWO, "zero": 2, "offload": "optimizer"},
    "offload-zero-2-bfloat16": {**TWO, "zero": 2, "offload": "optimizer", "dtype": "bfloat16"},
    "offload-zero-3": {**TWO, "zero": 3, "offload": "optimizer"},
    "offload-all": {**TWO, "zero": 3, "offload": "all"},
}
SETS = {
    "fitted": CONFIGURATIONS,
    "fresh": FRESH,
    "zero": ZERO,
    "quantized": QUANTIZED,
    "offloaded": OFFLOADED,
    "all": CONFIGURATIONS | FRESH | ZERO | QUANTIZED | OFFLOADED,
}
QUICK = ("sft", "sft-lora-checkpointing", "rm")
LENGTH = 256  # of every row, where a configuration says nothing else
STEPS = 2
MB = 2**20


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
    task, length = spec.get("task", "sft"), spec.get("length", LENGTH)
    chain = "3+8=1\n" * length
    answer = {"sft": "response", "oreo": "response"}.get(task)
    rows = []
    for n in range(spec["rows"]):
        text = chain[: length - 24 - n % 2]
        row: dict[str, Any] = {"id": f"r{n}", "prompt": f"{n % 10}+1?"}
        if task == "rm":
            row |= {"chosen": text, "rejected": "4" + text[1:]}  # pairs share their prompt alone
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
        "data": {"train": [{"path": str(home / "rows.jsonl")}], "max_length": length},
        "train": {"steps": STEPS, "batch_size": spec["rows"], "tokens_per_microbatch": spec["tokens"]},
    }
    if spec.get("lora"):
        recipe["policy"] |= {"lora": {"rank": 16}, "path": recipe["policy"].pop("from_config")}
        recipe["policy"] |= {key: spec[key] for key in ("quantization",) if key in spec}
    if "zero" in spec:
        recipe["deepspeed"] = {"zero_stage": spec["zero"], "offload": spec.get("offload", "none")}
    if task == "ppo":
        recipe |= {
            "reward": {"sources": [{"kind": "python", "path": str(home / "reward.py")}]},
            "rollout": {"n": 4, "max_new_tokens": 128},
            "algorithm": {"advantage": spec["advantage"], "kl_coef": spec["kl"]},
        }
        if spec.get("lora") and spec["advantage"] == "gae":
            recipe["value_model"] = {"lora": {"rank": 16}}
    return recipe


def one(spec: dict[str, Any], home: Path) -> dict[str, Any]:
    """In this rank's process: the trainer's steps, and its peak over what was there before."""
    rank, world = set_up()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhfctl.preflight.memory import estimate, shards_of
    from rlhfctl.recipe.tasks import TASKS
    from rlhfctl.run_dir import RunDir
    from rlhfctl.trainers import oreo, ppo, reward_model, sft
    from rlhfctl.trainers.context import RunContext
    from rlhfctl.trainers.distributed import barrier

    if "zero" in spec:
        from rlhfctl.trainers import zero  # noqa: F401  the library, before the model
    trainers = {"sft": sft.train, "rm": reward_model.train, "ppo": ppo.train, "oreo": oreo.train}
    task, run = spec.get("task", "sft"), RunDir(home / "run")
    if rank == 0:
        (home / "recipe.json").write_text(json.dumps(write_home(home, spec)))
        if spec.get("lora"):  # adapters stand on a checkpoint
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / "model"))
            model.save_pretrained(home / "model")
            del model
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # the run must not find room that stands in the baseline
        run.create()
    barrier()
    recipe: Any = TASKS[task].model_validate_json((home / "recipe.json").read_text())
    config = json.loads((home / "model/config.json").read_text())
    shards = shards_of(recipe, world)
    found = estimate(recipe, config, spec.get("dtype") == "bfloat16", world=world, shards=shards)
    assert found is not None
    ctx = RunContext(recipe, run, rank, world, torch.device("cpu"), False, 1, lambda: None, lambda said: None)
    forget_peak()
    before = memory("VmRSS")
    trainers[task](ctx)
    parts = {name: round(value / MB) for name, value in found.parts().items() if value and name != "peak"}
    return {
        "estimate_mb": round(found.peak / MB),
        "peak_mb": round((memory("VmHWM") - before) / MB),
        "baseline_mb": round(before / MB),
        "parts_mb": parts,
    }


def measured(name: str) -> dict[str, Any]:
    """A configuration in processes of its own; of several ranks the one that took most."""
    spec = SETS["all"][name]
    with tempfile.TemporaryDirectory() as home:
        try:
            found = on_ranks("benchmarks.memory", ["--one", name, "--home", home], spec.get("world", 1))
        except RuntimeError as error:
            return {"name": f"memory/{name}", "error": str(error)}
    peaks = [each["peak_mb"] for each in found]
    most = found[peaks.index(max(peaks))]
    ratio = round(most["estimate_mb"] / most["peak_mb"], 3)
    return {
        "name": f"memory/{name}",
        "ratio": ratio,
        **most,
        **({"ranks_mb": peaks} if len(peaks) > 1 else {}),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=SETS["all"], metavar="NAME")
    parser.add_argument("--set", choices=SETS, default="all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", help="a configuration, run in this process, with files in --home")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(SETS["all"][options.one], options.home)), flush=True)
        return
    for name in options.only or (QUICK if options.quick else SETS[options.set]):
        print(json.dumps(measured(name)), flush=True)


if __name__ == "__main__":
    main()
