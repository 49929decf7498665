"""Learning curves on the quickstart task: for each task seed an sft run, and from its policy one run per method.

    python -m benchmarks.learning OUT [METHOD...] [--seeds 0 1 2] [--steps 120] [--every 10] [--override KEY=VALUE]

A task seed decides which facts the demonstrations get wrong, the questions, and with 17 added every run's own seed.
What is done already is not done again. Prints a Markdown table and writes OUT/curves.json and OUT/table.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.learning.curves import Curve, marks, read_curve, table, to_json
from benchmarks.learning.methods import DENSE, METHODS, REWARD_MODELS

GOAL = 0.80
ALL = METHODS | DENSE


def train(task: str, run: Path, overrides: list[str]) -> None:
    """As a user runs it; a run that is done is left as it is, an interrupted one goes on."""
    if (run / "final").is_dir():
        return
    start = ["--resume"] if (run / "recipe.yaml").is_file() else [f"quickstart/{task}"]
    command = [sys.executable, "-m", "rlhfctl", task, *start, "--run-dir", str(run), "-q"]
    done = subprocess.run(
        command + (overrides if "--resume" not in start else []), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{run} failed with exit code {done.returncode}:\n{done.stderr}")


def sft_policy(out: Path, seed: int, threads: int) -> Path:
    """The directory of one task seed, with data/, model/ and sft/final in it."""
    home = out / f"seed-{seed}"
    make = [sys.executable, "-m", "rlhfctl.quickstart.chains", str(home), "--seed", str(seed)]
    if not (home / "data/eval.jsonl").is_file():
        subprocess.run(make, check=True, capture_output=True)
    overrides = [
        f"seed={17 + seed}",
        f"policy.from_config={home}/model",
        f"policy.tokenizer={home}/model",
        f"data.train=[{{path: {home}/data/sft.jsonl, format: prompt_response}}]",
        f"data.eval=[{{path: {home}/data/eval.jsonl, format: qa}}]",
        f"launch.threads={threads}",
    ]
    train("sft", home / "sft", overrides)
    return home


def reward_model(home: Path, name: str, seed: int, threads: int) -> None:
    overrides = [
        f"seed={17 + seed}",
        f"policy.path={home}/sft/final",
        f"data.train=[{{path: {home}/data/pairs.jsonl, format: preference}}]",
        f"data.eval=[{{path: {home}/data/pairs_eval.jsonl, format: preference}}]",
        f"launch.threads={threads}",
        *REWARD_MODELS[name],
    ]
    train("rm", home / name, last_of_each(overrides, home))


def last_of_each(overrides: list[str], home: Path) -> list[str]:
    """Later overrides of a key take the place of earlier ones."""
    last = {override.partition("=")[0]: override for override in overrides}
    return [override.replace("{home}", str(home)) for override in last.values()]


def run_of(home: Path, name: str, options: argparse.Namespace) -> Path:
    return home / (f"{name}-{options.tag}" if options.tag else name)


def learn(home: Path, name: str, seed: int, options: argparse.Namespace) -> Curve:
    method = ALL[name]
    if method.reward_model:
        reward_model(home, method.reward_model, seed, options.threads)
    overrides = [
        f"seed={17 + seed}",
        f"policy.path={home}/sft/final",
        f"data.train=[{{path: {home}/data/prompts.jsonl, format: qa}}]",
        f"data.eval=[{{path: {home}/data/eval.jsonl, format: qa}}]",
        f"train.steps={options.steps}",
        f"train.eval_every={options.every}",
        "train.eval_samples=500",
        "train.log_every=1",
        f"launch.threads={options.threads}",
        *method.changes,
        *options.override,
    ]
    run = run_of(home, name, options)
    train(method.recipe, run, last_of_each(overrides, home))
    return read_curve(run, name, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(ALL))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations (500 questions)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tag", default="", help="name of a variant, for runs beside the plain ones")
    parser.add_argument("--done", action="store_true", help="train nothing: the table of runs that are done")
    options = parser.parse_args()
    methods = options.methods or list(METHODS)
    unknown = [name for name in methods if name not in ALL]
    if unknown:
        parser.error(f"no method {unknown[0]!r}: one of {', '.join(ALL)}")
    curves = []
    for seed in options.seeds:
        home = options.out.resolve() / f"seed-{seed}"
        if not options.done:
            sft_policy(options.out.resolve(), seed, options.threads)
        for method in methods:
            if options.done and not (run_of(home, method, options) / "final").is_dir():
                continue
            curves.append(learn(home, method, seed, options))
            print(f"seed {seed}: {method}: {curves[-1].accuracy[-1]:.3f}", file=sys.stderr, flush=True)
    if not curves:
        parser.error(f"no run of {', '.join(methods)} is done in {options.out}")
    text = table(curves, marks(curves), GOAL)
    suffix = f"-{options.tag}" if options.tag else ""
    (options.out / f"curves{suffix}.json").write_text(to_json(curves))
    (options.out / f"table{suffix}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
