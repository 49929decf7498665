"""What 8 to 1,024 GPUs would take and give, by arithmetic: the tables of docs/scaling.md.

    python -m benchmarks.scaling.arithmetic

Nothing here was measured. Memory is the estimate of preflight/memory.py, the one that `--dry-run` prints. Bytes that a
rank sends follow what the engines do: gradients travel in float32, gathered parameters in bfloat16, a ring of N ranks
passes (N - 1) / N of a tensor on for each gather or scatter, and twice that for an all-reduce.

    plain, ZeRO-0   2 f P 4                         once a step
    ZeRO-1          f P 4 + f P 2                   gradients scattered, weights gathered, once a step
    ZeRO-2          M f P 4 + f P 2                 gradients after each of M passes
    ZeRO-3          M (f P 4 + 2 f P 2)             and parameters before each forward and backward pass

P parameters, f = (N - 1) / N. Nothing overlaps, as configured in trainers/zero.py:

    efficiency = t_compute / (t_compute + t_bytes + t_calls)
    t_compute  = 8 P T M / (MFU peak)      T tokens of a pass; 6 P a token, and 2 P more with gradient checkpointing
    t_bytes    = bytes / (share bandwidth)
    t_calls    = collectives latency log2 N
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhfctl.preflight.decoder import shape_of
from rlhfctl.preflight.memory import estimate
from rlhfctl.preflight.shards import shards_of
from rlhfctl.recipe.tasks import TASKS

# NVIDIA's data sheets of the H100 SXM and of the DGX H100, one direction of each link.
PEAK = 989.4e12  # bfloat16 without sparsity, FLOP/s
MEMORY = 80e9
NVLINK = 450e9  # of 900 GB/s both ways
NODE, RAIL = 8, 50e9  # GPUs of a node, and 400 Gb/s of InfiniBand for each of them
# Assumptions.
MFU = 0.40  # of the peak, where a GPU only computes
SHARE = 0.80  # of a link's rate that a collective reaches
LATENCY = 20e-6  # seconds of a collective and doubling of the ranks
TOKENS, PASSES = 8192, 4  # of a pack, and packs of a rank in a step
BUCKET = 50_000_000  # deepspeed.bucket_elements

RANKS = (8, 64, 256, 1024)
ENGINES = ("plain", "ZeRO-1", "ZeRO-2", "ZeRO-3")
# Of the config.json on the Hugging Face Hub.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        "hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "Qwen2.5-72B": {
        "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 29568, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 152064,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one rank and step."""

    bytes: float
    collectives: int


def recipe(task: str, engine: str, world: int) -> Any:
    """Full training in bfloat16 with gradient checkpointing, PASSES packs of TOKENS for each rank."""
    content: dict[str, Any] = {
        "task": task,
        "name": "arithmetic",
        "policy": {"path": "p", "dtype": "bfloat16", "gradient_checkpointing": True},
        "data": {"train": [{"path": "f"}], "max_length": 2048},
        "train": {"steps": 1, "batch_size": world * PASSES * TOKENS // 2048, "tokens_per_microbatch": TOKENS},
    }
    if engine != "plain":
        content["deepspeed"] = {"zero_stage": int(engine[-1]), "bucket_elements": BUCKET}
    if task == "ppo":
        content["reward"] = {"sources": [{"kind": "verifier", "name": "math_answer"}]}
        content["rollout"] = {"n": 8, "max_new_tokens": 1024, "engine": "vllm_server"}
        content["algorithm"] = {"advantage": "gae", "kl_coef": 0.05}
    return TASKS[task].model_validate(content)


def parameters_of(model: str) -> int:
    shape = shape_of(MODELS[model])
    assert shape is not None
    return shape.parameters


def memory(model: str, task: str, engine: str, world: int) -> int:
    """Bytes of a rank, the runtime's own aside."""
    found = recipe(task, engine, world)
    told = estimate(found, MODELS[model], True, cpu=False, world=world, shards=shards_of(found, world))
    assert told is not None
    return told.peak


def traffic(parameters: int, engine: str, world: int) -> Traffic:
    part = (world - 1) / world * parameters
    buckets = math.ceil(parameters / BUCKET)
    if engine == "plain":
        return Traffic(2 * part * 4, math.ceil(parameters / (1 << 24)))
    if engine == "ZeRO-1":
        return Traffic(part * (4 + 2), 2 * buckets)
    if engine == "ZeRO-2":
        return Traffic(part * (PASSES * 4 + 2), (PASSES + 1) * buckets)
    return Traffic(PASSES * part * (4 + 2 * 2), PASSES * 3 * buckets)


def bandwidth(world: int) -> float:
    """Bytes a second at which a ring passes data on: the slower of NVLink and all rails of a node together."""
    return SHARE * (NVLINK if world <= NODE else min(NVLINK, NODE * RAIL))


def efficiency(parameters: int, engine: str, world: int) -> float:
    sent = traffic(parameters, engine, world)
    compute = 8 * parameters * TOKENS * PASSES / (MFU * PEAK)
    calls = sent.collectives * LATENCY * math.log2(world)
    return compute / (compute + sent.bytes / bandwidth(world) + calls)


def tables() -> Iterator[str]:
    """The tables of docs/scaling.md, line by line."""
    yield from head("Memory of a rank, GB (more than the 80 of an H100 in brackets)")
    for model in MODELS:
        for task in ("sft", "ppo"):
            for engine in ENGINES:
                cells = [gigabytes(memory(model, task, engine, world)) for world in RANKS]
                yield row(f"{model}, {task}, {engine}", cells)
    yield ""
    parameters = parameters_of("Qwen3-8B")
    yield from head("Qwen3-8B, sft: GB sent by a rank in a step, efficiency")
    for engine in ENGINES:
        sent = [traffic(parameters, engine, world).bytes / 1e9 for world in RANKS]
        shares = [efficiency(parameters, engine, world) for world in RANKS]
        cells = [f"{each:.0f}, {100 * share:.0f} %" for each, share in zip(sent, shares, strict=True)]
        yield row(engine, cells)


def head(title: str) -> Iterator[str]:
    yield f"| {title} | " + " | ".join(f"{world:,} GPUs" for world in RANKS) + " |"
    yield "|---|" + "---:|" * len(RANKS)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}" if size <= MEMORY else f"({size / 1e9:.0f})"


def row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(tables()))
