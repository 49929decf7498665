"""How much of the processor's matrix rate a training step reaches, and where the rest goes.

    python -m benchmarks.mfu [--dtype float32|bfloat16] [--vocabulary 4096] [--steps 8]

sft steps of the benchmarks' model on rows of its lengths, in this process, on one thread. Model FLOPs of a step are
those of its matrix products: 6 per weight of the layers and token, 6 per weight of the head and trained position
(attention itself, 3 to 5 % at these lengths, is left out). The roof is what the same products of the same shapes reach
alone:

    utilisation = CPU seconds of the bare products / CPU seconds of the step

The products are timed before and after the steps and the mean is taken: a shared machine changes its speed. A large
vocabulary's head makes four products where three count (models/head_tiles.py).
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.workload import make_model
from rlhfctl.models.linear import product
from rlhfctl.models.load import backbone, head_weight, load_causal_lm
from rlhfctl.recipe.sections import Optim, Policy
from rlhfctl.trainers.optimizer import Optimizer, clip_and_step
from rlhfctl.trainers.sft import train_batch

BUDGET, ROWS = 1024, 7
KINDS = {
    "matrix products": ("linear_pointwise", "::mm", "addmm", "matmul", "mkldnn"),
    "attention": ("scaled_dot_product", "flash"),
    "optimizer": ("_fused_adamw", "_foreach", "Optimizer"),
    "copies, concatenation, fills": ("copy_", "cat", "zero_", "fill_", "clone", "repeat", "index", "gather", "pad"),
    "elementwise, reductions": (
        "mul", "add", "silu", "exp", "sub", "neg", "rsqrt", "pow", "mean", "sum", "div", "max", "log", "cos", "sin",
    ),
}  # fmt: skip


@dataclass
class Rows:
    ids: list[list[int]]
    trained: list[range]
    lengths: list[int]


def make_rows(steps: int) -> Rows:
    """Log-normal lengths of mean 142, the last two thirds trained."""
    rng = random.Random(20260)
    lengths = [int(min(512, max(16, rng.lognormvariate(4.7, 0.85)))) for _ in range(steps * ROWS)]
    ids = [[rng.randrange(4096) for _ in range(length)] for length in lengths]
    return Rows(ids, [range(length // 3, length) for length in lengths], lengths)


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began) / repeats


def product_seconds(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """CPU seconds of the output, of the input's gradient and of the weight's, of one layer over `rows`."""
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    grad = torch.randn(rows, outputs).to(dtype)
    repeats = max(2, int(1e10 / (2 * rows * inputs * outputs)))
    return (
        cpu_seconds(lambda: product(x, weight), repeats),
        cpu_seconds(lambda: product(grad, weight.t()), repeats),
        cpu_seconds(lambda: product(grad.t(), x.t()), repeats),
    )


def roof(model: nn.Module, trained_share: float) -> tuple[float, list[dict[str, Any]]]:
    """CPU seconds a token of the bare products, and the rates of each shape."""
    weight = head_weight(model)
    shapes: dict[tuple[int, int], int] = {}
    for module in backbone(model).modules():
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    total, table = 0.0, []
    cases = [(BUDGET, *shape, count, 1.0) for shape, count in shapes.items()]
    cases.append((int(BUDGET * trained_share) // 64 * 64, weight.shape[1], weight.shape[0], 1, trained_share))
    for rows, inputs, outputs, count, share in cases:
        seconds = product_seconds(rows, inputs, outputs, weight.dtype)
        total += count * share * sum(seconds) / rows
        flops = 2 * rows * inputs * outputs / 1e9
        rates = [round(flops / each, 1) for each in seconds]
        table.append({"rows": rows, "in": inputs, "out": outputs, "layers": count, "gflops": rates})
    return total, table


def by_kind(profile: Any) -> dict[str, float]:
    """Share of the CPU time of each kind of operation."""
    spent = dict.fromkeys([*KINDS, "python and the rest"], 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), None)
        spent[kind or "python and the rest"] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: round(time / whole, 3) for kind, time in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), options.vocabulary)
        policy = Policy(path=directory, dtype=options.dtype)
        model = load_causal_lm(policy, torch.device("cpu"), 1)
    optim = Optim(lr=1e-3, schedule="constant", warmup_ratio=0.0)
    optimizer = Optimizer(model.named_parameters(), optim, 1e-3, options.steps)
    rows = make_rows(options.steps + 1)
    share = sum(map(len, rows.trained)) / sum(rows.lengths)

    def step(number: int) -> int:
        mine = list(range(number * ROWS, (number + 1) * ROWS))
        train_batch(model, rows, mine, sum(len(rows.trained[row]) for row in mine), BUDGET, optimizer)  # type: ignore[arg-type]
        clip_and_step([optimizer], 1.0)
        return sum(rows.lengths[row] for row in mine)

    step(0)
    before, _ = roof(model, share)
    began = time.process_time()
    tokens = sum(step(number) for number in range(1, options.steps + 1))
    seconds = (time.process_time() - began) / tokens
    after, table = roof(model, share)
    for line in table:
        print(json.dumps(line))
    head = head_weight(model)
    layers = sum(each.weight.numel() for each in backbone(model).modules() if isinstance(each, nn.Linear))
    bare, flops = (before + after) / 2, 6 * (layers + share * head.numel())
    with torch.profiler.profile() as profile:
        step(1)
    found = {
        "dtype": options.dtype,
        "vocabulary": options.vocabulary,
        "tokens_per_cpu_s": round(1 / seconds, 1),
        "roof_tokens_per_cpu_s": round(1 / bare, 1),
        "model_gflops_per_cpu_s": round(flops / seconds / 1e9, 1),
        "utilisation": round(bare / seconds, 3),
        "where": by_kind(profile),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
