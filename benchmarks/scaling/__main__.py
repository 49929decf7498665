"""One batch on one and on two processes, plain and at each ZeRO stage: tokens per CPU-second and memory of each rank.

    python -m benchmarks.scaling [--only NAME ...] [--quick]

Every configuration trains a model of 12 M parameters in float32 for 4 steps in processes of its own; its figures are
of steps 2 and 3. JSON lines scaling/TASK-ENGINE-WORLD: tokens_per_cpu_s (over the CPU seconds of all ranks), cpu_s,
rank_mb (each rank's peak over what was resident before the model). --quick: two of them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import MB, write_home
from benchmarks.ranks import forget_peak, memory, on_ranks, set_up

SHAPE = {"vocab": 8192, "hidden": 384, "layers": 4, "inner": 1024, "tokens": 1024, "rows": 8}
TASKS = {"sft": {}, "ppo": {"task": "ppo", "kl": 0.0, "advantage": "gae"}}
ENGINES = {"plain": {}, **{f"zero{stage}": {"zero": stage} for stage in range(4)}}
CONFIGURATIONS = {
    f"{task}-{engine}-{world}": {**SHAPE, **keys, **choice, "world": world}
    for task, keys in TASKS.items()
    for engine, choice in ENGINES.items()
    for world in (1, 2)
}
QUICK = ("sft-plain-1", "sft-zero2-2")
STEPS = 4


def one(spec: dict[str, Any], home: Path) -> dict[str, Any]:
    """In this rank's process: what the steps between the first and the last took."""
    rank, world = set_up()
    import torch

    from rlhfctl.recipe import tasks
    from rlhfctl.run_dir import RunDir
    from rlhfctl.trainers import ppo, sft
    from rlhfctl.trainers.context import RunContext
    from rlhfctl.trainers.distributed import barrier

    if "zero" in spec:
        from rlhfctl.trainers import zero  # noqa: F401  the library, before the model
    run, task = RunDir(home / "run"), spec.get("task", "sft")
    if rank == 0:
        content = write_home(home, spec)
        content["train"] |= {"steps": STEPS, "log_every": 1}
        content.get("rollout", {})["max_new_tokens"] = 64
        (home / "recipe.json").write_text(json.dumps(content))
        run.create()
    barrier()
    recipe: Any = tasks.TASKS[task].model_validate_json((home / "recipe.json").read_text())
    spent: list[float] = []
    ctx = RunContext(
        recipe, run, rank, world, torch.device("cpu"), False, 1,
        lambda: spent.append(time.process_time()),  # asked after every step but the last
        lambda said: None,
    )  # fmt: skip
    forget_peak()
    before = memory("VmRSS")
    {"sft": sft.train, "ppo": ppo.train}[task](ctx)
    tokens = [json.loads(line)["tokens"] for line in run.metrics.read_text().splitlines()]
    peak = memory("VmHWM") - before
    return {"tokens": tokens[-2] - tokens[0], "cpu_s": spent[-1] - spent[0], "peak_mb": round(peak / MB)}


def measured(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        try:
            spec = CONFIGURATIONS[name]
            ranks = on_ranks("benchmarks.scaling", ["--one", name, "--home", home], spec["world"])
        except RuntimeError as error:
            return {"name": f"scaling/{name}", "error": str(error)}
    cpu, tokens = sum(rank["cpu_s"] for rank in ranks), ranks[0]["tokens"]
    return {
        "name": f"scaling/{name}",
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "tokens": tokens,
        "cpu_s": round(cpu, 2),
        "rank_mb": [rank["peak_mb"] for rank in ranks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", help="a configuration, run in this process, with files in --home")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(CONFIGURATIONS[options.one], options.home)), flush=True)
        return
    for name in options.only or (QUICK if options.quick else CONFIGURATIONS):
        print(json.dumps(measured(name)), flush=True)


if __name__ == "__main__":
    main()
