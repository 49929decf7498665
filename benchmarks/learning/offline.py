"""OREO on the quickstart task: against rejection sampling on the same samples, and with search guided by a value.

    python -m benchmarks.learning.offline OUT [--seeds 0 1 2] [--threads 1] [--parts train search]

For each task seed, by the commands that a user would type: sft, 8 samples a prompt with their verdicts, oreo on all of
them, sft again on the right ones alone (rejection sampling), value-guided beams over the SFT policy, and a value fitted
afresh on the OREO policy's own samples with beams over that policy. What is done already is not done again. Writes
OUT/oreo.json, which benchmarks.learning.offline_table prints; oreo.md beside this file says what was run with it.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.learning.__main__ import sft_policy
from benchmarks.learning.oracle import oracle_beam

LIMIT = 500  # prompts of a search
SAMPLES = 16_000  # of value_fit
FIT_STEPS = 800
REJECTION_STEPS = 600


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        found = make()
        path.write_text(json.dumps(found) + "\n")
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def cpu(command: list[str]) -> tuple[float, str]:
    """CPU seconds of the command and its children, start-up included, and its stdout."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{stderr}")
    return sum(os.times()[2:4]), stdout


def run(*words: str) -> tuple[float, str]:
    before = sum(os.times()[2:4])
    after, stdout = cpu([sys.executable, "-m", *words])
    return round(after - before, 1), stdout


def last(directory: Path) -> dict[str, float]:
    """Greedy answers at the end of a run, and the best of its evaluations after a step."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    seen = [record for record in records if "eval/accuracy" in record and record["step"]]
    end = seen[-1]
    return {
        "accuracy": end["eval/accuracy"],
        "path_accuracy": end["eval/path_accuracy"],
        "best_accuracy": max(record["eval/accuracy"] for record in seen),
    }


def trained(
    home: Path, task: str, name: str, rows: str, seed: int, threads: int, *more: str
) -> dict[str, Any]:
    evaluation = f"data.eval=[{{path: {home}/data/eval.jsonl, format: qa}}]"
    common = [f"seed={17 + seed}", f"policy.path={home}/sft/final", evaluation, f"launch.threads={threads}"]
    words = ["rlhfctl", task, f"quickstart/{task}", "--run-dir", str(home / name), "-q"]
    seconds, _ = run(*words, *common, f"data.train=[{rows}]", *more)
    return {"cpu_seconds": seconds, **last(home / name)}


def evaluated(run_directory: Path, *options: str) -> dict[str, Any]:
    seconds, stdout = run("rlhfctl", "eval", str(run_directory), *options, "--json", "-q")
    found = json.loads(stdout)
    return {"cpu_seconds": seconds, **{key: found[key] for key in ("metrics", "differences", "prompts")}}


def train_seed(home: Path, seed: int, threads: int) -> dict[str, Any]:
    """The policies of one task seed."""
    rows, right = home / "trajectories.jsonl", home / "right.jsonl"

    def sampled() -> dict[str, Any]:
        words = ["--search", "sample", "-n", "8", "--seed", str(seed), "--save-trajectories", str(rows)]
        seconds, stdout = run(
            "rlhfctl",
            "eval",
            str(home / "sft"),
            "--data",
            f"{home}/data/prompts.jsonl",
            *words,
            "--json",
            "-q",
        )
        kept = [row for row in map(json.loads, rows.read_text().splitlines()) if row["correct"]]
        lines = [json.dumps({"prompt": row["prompt"], "response": row["response"]}) for row in kept]
        right.write_text("\n".join(lines) + "\n")
        lucky = sum(not row["path_correct"] for row in kept)
        counts = json.loads(stdout)["trajectories"]
        del counts["path"]
        return {"cpu_seconds": seconds, "right_with_wrong_steps": lucky, **counts}

    return {
        "sft": last(home / "sft"),
        "samples": cached(home / "samples.json", sampled),
        "oreo": cached(
            home / "oreo.json",
            lambda: trained(home, "oreo", "oreo", f"{{path: {rows}, format: trajectory}}", seed, threads),
        ),
        "rejection": cached(
            home / "rejection.json",
            lambda: trained(
                home, "sft", "rejection", f"{{path: {right}, format: prompt_response}}", seed, threads,
                "policy.from_config=null", "policy.tokenizer=null", f"train.steps={REJECTION_STEPS}",
                "optim.lr=1e-3", "train.eval_every=100",
            ),
        ),
    }  # fmt: skip


def search_seed(home: Path, seed: int) -> dict[str, Any]:
    """Beams over the SFT policy and over the OREO policy."""
    limit = ["--limit", str(LIMIT), "--seed", str(seed)]
    own = ["--value-model", str(home / "oreo/value_model")]
    fitted = home / "value"

    def fit() -> dict[str, Any]:
        seconds, _ = run(
            "rlhfctl.trainers.value_fit", str(home / "oreo"), "--data", f"{home}/data/sft.jsonl", "--out", str(fitted),
            "--samples", str(SAMPLES), "--steps", str(FIT_STEPS), "--seed", str(seed),
        )  # fmt: skip
        facts = json.loads((fitted / "config.json").read_text())["value_model"]
        return {"cpu_seconds": seconds, **facts}

    def beam(policy: str, width: int, *options: str) -> dict[str, Any]:
        return evaluated(home / policy, "--search", "beam", "-n", str(width), *limit, *options)

    found = {
        "oracle_beam_4_on_sft": cached(
            home / "oracle.json", lambda: oracle_beam(home / "sft", LIMIT, 4, seed)
        ),
        "oreo_value_beam_2_on_sft": cached(home / "own2.json", lambda: beam("sft", 2, *own)),
        "value_fit": cached(home / "fit.json", fit),
    }
    for width in (2, 4):
        for alpha in ("0.5", "0"):
            options = ["--value-model", str(fitted), "--alpha", alpha]
            found[f"beam_{width}_alpha_{alpha}"] = cached(
                home / f"beam{width}-{alpha}.json",
                lambda width=width, options=options: beam("oreo", width, *options),  # type: ignore[misc]
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=("train", "search"), default=["train", "search"])
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        home = sft_policy(options.out.resolve(), seed, options.threads)
        found[str(seed)] = train_seed(home, seed, options.threads)
        if "search" in options.parts:
            found[str(seed)] |= search_seed(home, seed)
        print(f"seed {seed} done", file=sys.stderr, flush=True)
        (options.out / "oreo.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
