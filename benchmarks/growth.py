"""How cost grows, and what a key costs or saves: JSON lines, then tables.

    python -m benchmarks.growth [length|vocabulary|samples|batch|processes|keys]... [--threads N] [--dtype D]

Each table changes one thing of a workload of `benchmarks/__main__.py`. CPU seconds per 1,000 tokens are fitted as
a * x^b by least squares on the logarithms; b is the exponent. `keys`: every run is divided by the run without the key.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.__main__ import run
from benchmarks.workload import make_data, make_model_apart, make_rows_of

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
VOCABULARIES = (4_096, 16_384, 65_536, 151_936)
SAMPLES = (1, 2, 4, 8, 16)
BATCHES = (8, 16, 32, 64)
TOKENS = 16_384  # of each run over lengths: four batches of 4,096
KEYS = {
    "sft": (
        "train.tokens_per_microbatch=256",
        "train.tokens_per_microbatch=4096",
        "policy.gradient_checkpointing=true",
        "policy.lora={rank: 8}",
        "policy.dtype=bfloat16",
    ),
    "ppo": (
        "train.tokens_per_microbatch=256",
        "train.tokens_per_microbatch=4096",
        "algorithm.kl_coef=0",
        "algorithm.ppo_epochs=2",
        "algorithm.minibatches=4",
        "rollout.max_batch_tokens=1024",
        "value_model.shared_trunk=true",
        "policy.dtype=bfloat16",
    ),
}
Row = tuple[str, float, dict[str, object]]  # label, x, what the run gave


def lengths(options: argparse.Namespace, scratch: Path, model: Path) -> Iterator[Row]:
    for length in LENGTHS:
        data = scratch / f"rows-{length}"
        count = TOKENS // length
        make_rows_of(model, data, length, count)
        overrides = [
            f"data.train.0.limit={count}", "data.max_length=4096", "train.tokens_per_microbatch=4096",
            f"train.batch_size={max(1, 4096 // length)}",
        ]  # fmt: skip
        yield f"{length} tokens", float(length), run("sft", options, model, data, overrides)


def vocabularies(options: argparse.Namespace, scratch: Path, model: Path) -> Iterator[Row]:
    for size in VOCABULARIES:
        directory = scratch / f"vocabulary-{size}"
        make_model_apart(directory, size)
        found = run("sft", options, directory, scratch / "data", ["data.train.0.limit=64"])
        yield f"{size} rows", float(size), found


def samples(options: argparse.Namespace, scratch: Path, model: Path) -> Iterator[Row]:
    """32 responses a step, n to a prompt; an estimator that takes one sample as well."""
    for n in SAMPLES:
        overrides = [f"rollout.n={n}", "algorithm.advantage=reinforce", "train.steps=3"]
        yield f"n {n}", float(n), run("grpo", options, model, scratch / "data", overrides)


def batches(options: argparse.Namespace, scratch: Path, model: Path) -> Iterator[Row]:
    for size in BATCHES:
        overrides = [f"train.batch_size={size}", f"train.steps={max(2, 128 // size)}"]
        yield f"batch {size}", float(size), run("grpo", options, model, scratch / "data", overrides)


def processes(options: argparse.Namespace, scratch: Path, model: Path) -> Iterator[Row]:
    """CPU seconds of rank 0 alone are recorded: tokens per CPU-second are of both ranks' tokens over twice those."""
    for count in (1, 2):
        overrides = [f"launch.nproc_per_node={count}", "train.batch_size=14"]
        found = run("sft", options, model, scratch / "data", overrides)
        found["tokens_per_cpu_s"] = round(float(str(found["tokens_per_cpu_s"])) / count, 1)
        yield f"{count} processes", float(count), found


GROWTH = {
    "length": lengths,
    "vocabulary": vocabularies,
    "samples": samples,
    "batch": batches,
    "processes": processes,
}


def exponent(rows: Sequence[Row]) -> float:
    """b of CPU seconds per token = a * x^b."""
    xs = [math.log(x) for _, x, _ in rows]
    ys = [-math.log(float(str(found["tokens_per_cpu_s"]))) for _, _, found in rows]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def growth_table(name: str, rows: Sequence[Row]) -> str:
    lines = [f"| {name} | CPU s / 1,000 tokens | tokens / CPU-s | peak MB |", "|---|---:|---:|---:|"]
    for label, _, found in rows:
        rate = float(str(found["tokens_per_cpu_s"]))
        lines.append(f"| {label} | {1000 / rate:.3f} | {rate:.0f} | {found['peak_rss_mb']} |")
    return "\n".join([*lines, "", f"Exponent: {exponent(rows):.2f}"])


def key_table(options: argparse.Namespace, scratch: Path, model: Path) -> str:
    lines = [
        "| workload | key | tokens / CPU-s | peak MB | speed | memory |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, overrides in KEYS.items():
        base: dict[str, object] = {}
        for override in ("", *overrides):
            found = run(name, options, model, scratch / "data", [override] if override else [])
            base = base or found
            print(json.dumps(found | {"key": override}), flush=True)
            speed, memory = (
                float(str(found[key])) / float(str(base[key])) for key in ("tokens_per_cpu_s", "peak_rss_mb")
            )
            shown = f"`{override}`" if override else "as it is"
            lines.append(
                f"| {name} | {shown} | {found['tokens_per_cpu_s']} | {found['peak_rss_mb']} | {speed:.2f}x | "
                f"{memory:.2f}x |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join([*GROWTH, "keys"]))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    wanted = options.tables or [*GROWTH, "keys"]
    unknown = [name for name in wanted if name not in (*GROWTH, "keys")]
    if unknown:
        parser.error(f"no table {unknown[0]!r}: one of {', '.join([*GROWTH, 'keys'])}")
    with tempfile.TemporaryDirectory() as directory:
        scratch, model = Path(directory), Path(directory) / "model"
        make_model_apart(model, 4096)
        make_data(model, scratch / "data")
        for name in wanted:
            if name == "keys":
                table = key_table(options, scratch, model)
            else:
                rows = []
                for label, x, found in GROWTH[name](options, scratch, model):
                    rows.append((label, x, found))
                    print(json.dumps(found | {"of": label}), flush=True)
                table = growth_table(name, rows)
            print(table, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
