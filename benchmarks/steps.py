"""What a training step costs in one process: over row length and vocabulary, and with keys that change its passes.

    python -m benchmarks.steps [length|vocabulary|keys]...

As benchmarks/growth.py for sft, without starting a run for each figure (and so without its peak of memory): CPU
seconds of whole steps, forward, backward and optimizer, after one step that warms up. Rows of one length, or of the
benchmarks'.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.growth import Row, exponent
from benchmarks.mfu import Rows, make_rows
from benchmarks.workload import make_model
from rlhfctl.models.load import load_causal_lm
from rlhfctl.recipe.sections import Optim, Policy
from rlhfctl.trainers.optimizer import Optimizer, clip_and_step
from rlhfctl.trainers.sft import train_batch

LENGTHS = (64, 256, 1024, 4096)
VOCABULARIES = (4_096, 16_384, 65_536, 151_936)
BATCH = 4096  # tokens of a step over lengths
KEYS: dict[str, tuple[dict[str, object], int]] = {
    "as it is": ({}, 1024),
    "train.tokens_per_microbatch=256": ({}, 256),
    "train.tokens_per_microbatch=4096": ({}, 4096),
    "policy.gradient_checkpointing=true": ({"gradient_checkpointing": True}, 1024),
    "policy.dtype=bfloat16": ({"dtype": "bfloat16"}, 1024),
}


def of_length(length: int, steps: int) -> list[Rows]:
    """Steps of BATCH tokens; the second half of each row is trained."""
    count = BATCH // length
    ids = [[(row * 7919 + place * 31) % 4096 for place in range(length)] for row in range(count)]
    return [Rows(ids, [range(length // 2, length)] * count, [length] * count)] * steps


def of_the_benchmark(steps: int, each: int = 14) -> list[Rows]:
    rows = make_rows(steps * 2)
    parts = [slice(step * each, (step + 1) * each) for step in range(steps)]
    return [Rows(rows.ids[part], rows.trained[part], rows.lengths[part]) for part in parts]


def rate(directory: Path, batches: list[Rows], budget: int, policy: dict[str, object]) -> dict[str, object]:
    """Tokens per CPU-second of all steps but the first."""
    spec = Policy.model_validate({"path": str(directory), "dtype": "float32"} | policy)
    model = load_causal_lm(spec, torch.device("cpu"), 1)
    optim = Optim(lr=1e-3, schedule="constant", warmup_ratio=0.0)
    optimizer = Optimizer(model.named_parameters(), optim, 1e-3, len(batches))
    began, tokens = 0.0, 0
    for step, rows in enumerate(batches):
        if step == 1:
            began = time.process_time()
        trained = sum(map(len, rows.trained))
        train_batch(model, rows, list(range(len(rows.ids))), trained, budget, optimizer)  # type: ignore[arg-type]
        clip_and_step([optimizer], 1.0)
        tokens += sum(rows.lengths) if step else 0
    return {"tokens_per_cpu_s": round(tokens / (time.process_time() - began), 1)}


def lengths(model: Path, scratch: Path) -> Iterator[Row]:
    for length in LENGTHS:
        yield f"{length} tokens", float(length), rate(model, of_length(length, 3), BATCH, {})


def vocabularies(model: Path, scratch: Path) -> Iterator[Row]:
    for size in VOCABULARIES:
        directory = scratch / f"vocabulary-{size}"
        make_model(directory, size)
        yield f"{size} rows", float(size), rate(directory, of_the_benchmark(2), 1024, {})


def keys(model: Path, scratch: Path) -> Iterator[Row]:
    for name, (policy, budget) in KEYS.items():
        yield name, 1.0, rate(model, of_the_benchmark(3), budget, policy)


TABLES = {"length": lengths, "vocabulary": vocabularies, "keys": keys}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    options = parser.parse_args()
    unknown = [name for name in options.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown[0]!r}: one of {', '.join(TABLES)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        scratch, model = Path(directory), Path(directory) / "model"
        make_model(model, 4096)
        for name in options.tables or list(TABLES):
            rows = []
            for label, x, found in TABLES[name](model, scratch):
                rows.append((label, x, found))
                print(json.dumps(found | {"of": label}), flush=True)
            if name != "keys":
                print(f"{name}: exponent {exponent(rows):.2f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
