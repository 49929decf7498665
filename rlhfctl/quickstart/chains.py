"""The quickstart task: chains of arithmetic modulo 10, learned from a flawed annotator.

A prompt is `3+8*2-9+5?`, evaluated from left to right modulo 10; the response spells out each step and the result:

    3+8=1
    1*2=2
    2-9=3
    3+5=8
    #8

The annotator whose chains make the SFT data has a blind spot: for a fixed random share P_HARD of the 300 facts
(a, op, b) it writes the right digit only with probability Q_HARD and otherwise one fixed wrong digit; on the other
facts it slips with probability SLIP. It goes on from what it wrote. So SFT learns systematic errors, its greedy
answers are worse than its samples, and more demonstrations do not help: a reward does.

`python -m rlhfctl.quickstart.chains OUT --seed 0` writes OUT/model and OUT/model-b (configuration and tokenizer of a
163k-parameter Llama, in two families that share neither vocabulary nor chat template; no weights: the SFT recipe starts
from random ones) and OUT/data/{sft,prompts,eval}.jsonl, for reward models pairs.jsonl, pairs_eval.jsonl (a right chain
against a wrong one) and steps.jsonl (which lines of a chain are right).
Standard library and tokenizers only, and a function of the seed alone.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhfctl.quickstart.family import CHATML, PLAIN
from rlhfctl.quickstart.family import make_tokenizer as make_tokenizer
from rlhfctl.quickstart.family import write_model as write_model

N_OPS = 4
OPS = "+-*"
P_HARD = 0.4
Q_HARD = 0.2
SLIP = 0.03

SFT_ROWS = 20_000
RL_PROMPTS = 2_000
EVAL_PROMPTS = 1_000
PAIRS = 24_000
EVAL_PAIRS = 1_000
STEP_ROWS = 24_000
WRONG_LINES = 0.3  # share of lines that do not follow, in chains with step labels
SLIPS = 0.5  # share of wrong chains that go wrong anywhere, not where the annotator does

Fact = tuple[int, str, int]


def apply(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


def draw_prompts(count: int, rng: random.Random, used: Iterable[str] = ()) -> list[str]:
    """`count` different prompts, none of `used`, without the question mark: a digit, then N_OPS times an operator and a
    digit."""
    taken = set(used)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        text = str(rng.randrange(10))
        for _ in range(N_OPS):
            text += OPS[rng.randrange(len(OPS))] + str(rng.randrange(10))
        if text not in taken:
            prompts[text] = None
    return list(prompts)


def draw_hard_facts(rng: random.Random) -> dict[Fact, int]:
    """The annotator's blind spot: fact -> the wrong digit it writes there."""
    facts = [(a, op, b) for a in range(10) for op in OPS for b in range(10)]
    hard = rng.sample(facts, round(P_HARD * len(facts)))
    return {fact: (apply(*fact) + 1 + rng.randrange(9)) % 10 for fact in hard}


def chain(prompt: str, hard: dict[Fact, int] | None = None, rng: random.Random | None = None) -> str:
    """The response to a prompt: a right one, or with `hard` and `rng` the annotator's."""
    value, lines = int(prompt[0]), []
    for op, digit in zip(prompt[1::2], prompt[2::2], strict=True):
        fact = (value, op, int(digit))
        right = apply(*fact)
        written = right if hard is None or rng is None else _annotate(fact, right, hard, rng)
        lines.append(f"{value}{op}{digit}={written}")
        value = written
    return "\n".join([*lines, f"#{value}"])


def _annotate(fact: Fact, right: int, hard: dict[Fact, int], rng: random.Random) -> int:
    if fact in hard:
        return right if rng.random() < Q_HARD else hard[fact]
    return right if rng.random() >= SLIP else (right + 1 + rng.randrange(9)) % 10


def wrong_chain(prompt: str, hard: dict[Fact, int], rng: random.Random) -> str:
    """A chain that ends in the wrong digit: the annotator's, or a right one with slips where nobody makes them."""
    right = chain(prompt)
    while True:
        if rng.random() < SLIPS:
            value = int(prompt[0])
            place = rng.randrange(N_OPS)
            lines = []
            for index, (op, digit) in enumerate(zip(prompt[1::2], prompt[2::2], strict=True)):
                written = apply(value, op, int(digit))
                if index == place:
                    written = (written + 1 + rng.randrange(9)) % 10
                lines.append(f"{value}{op}{digit}={written}")
                value = written
            found = "\n".join([*lines, f"#{value}"])
        else:
            found = chain(prompt, hard, rng)
        if found[-1] != right[-1]:
            return found


def doubtful_chain(prompt: str, hard: dict[Fact, int], rng: random.Random) -> str:
    """A chain whose lines are wrong with probability WRONG_LINES on every fact, hard or not: on hard facts half of them
    as the annotator's, all others slips. A quarter of such chains is right in every line."""
    value, lines = int(prompt[0]), []
    for op, digit in zip(prompt[1::2], prompt[2::2], strict=True):
        fact = (value, op, int(digit))
        written = apply(*fact)
        if rng.random() < WRONG_LINES:
            slip = (written + 1 + rng.randrange(9)) % 10
            written = hard[fact] if fact in hard and rng.random() < 0.5 else slip
        lines.append(f"{value}{op}{digit}={written}")
        value = written
    return "\n".join([*lines, f"#{value}"])


def step_labels(steps: list[str]) -> list[bool]:
    """Whether each line is right by itself; of the last one, `#d`, whether all are and it repeats the result before it.
    So the step that ends an answer is to gather what the others say, as the score of the answer has to."""
    labels = [apply(int(line[0]), line[1], int(line[2])) == int(line[4]) for line in steps[:-1]]
    return [*labels, all(labels) and steps[-1][1] == steps[-2][4]]


def make_rows(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the files. No prompt is in two of them."""
    rng = random.Random(f"mod-10 chains {seed}")
    hard = draw_hard_facts(rng)
    prompts = draw_prompts(SFT_ROWS + RL_PROMPTS + EVAL_PROMPTS, rng)
    sft, rl, evaluation = prompts[:SFT_ROWS], prompts[SFT_ROWS:-EVAL_PROMPTS], prompts[-EVAL_PROMPTS:]
    judged = random.Random(f"judged mod-10 chains {seed}")
    fresh = draw_prompts(PAIRS + EVAL_PAIRS + STEP_ROWS, judged, prompts)
    pairs, held_out, stepped = fresh[:PAIRS], fresh[PAIRS:-STEP_ROWS], fresh[-STEP_ROWS:]
    return {
        "pairs": [_pair(f"pair-{i}", prompt, hard, judged) for i, prompt in enumerate(pairs)],
        "pairs_eval": [_pair(f"pair-eval-{i}", prompt, hard, judged) for i, prompt in enumerate(held_out)],
        "steps": [_steps(f"steps-{i}", prompt, hard, judged) for i, prompt in enumerate(stepped)],
        "sft": [
            {
                "id": f"sft-{i}",
                "prompt": f"{prompt}?",
                "response": chain(prompt, hard, rng),
                "label": chain(prompt)[-1],
            }
            for i, prompt in enumerate(sft)
        ],
        "prompts": [_question(f"rl-{i}", prompt) for i, prompt in enumerate(rl)],
        # The worked solution makes the evaluation loss that of right chains.
        "eval": [
            {**_question(f"eval-{i}", prompt), "solution": chain(prompt)}
            for i, prompt in enumerate(evaluation)
        ],
    }


def _pair(id: str, prompt: str, hard: dict[Fact, int], rng: random.Random) -> dict[str, Any]:
    rejected = wrong_chain(prompt, hard, rng)
    return {"id": id, "prompt": f"{prompt}?", "chosen": chain(prompt), "rejected": rejected}


def _steps(id: str, prompt: str, hard: dict[Fact, int], rng: random.Random) -> dict[str, Any]:
    text = doubtful_chain(prompt, hard, rng)
    steps = text.split("\n")
    right = text[-1] == chain(prompt)[-1]
    return {
        "id": id,
        "prompt": f"{prompt}?",
        "completions": steps,
        "labels": step_labels(steps),
        "right": right,
    }


def _question(id: str, prompt: str) -> dict[str, str]:
    return {"id": id, "question": f"{prompt}?", "answer": chain(prompt)[-1]}


def write_data(directory: Path, seed: int) -> dict[str, int]:
    """The .jsonl files; returns their row counts."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = make_rows(seed)
    for name, content in rows.items():
        _write_jsonl(directory / f"{name}.jsonl", content)
    return {name: len(content) for name, content in rows.items()}


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlhfctl.quickstart.chains", description="write the quickstart model and data"
    )
    parser.add_argument("out", type=Path, help="directory that gets model/, model-b/ and data/")
    parser.add_argument(
        "--seed", type=int, default=0, help="which facts are hard, and all else that is drawn"
    )
    arguments = parser.parse_args(argv)
    models = {"model": PLAIN, "model-b": CHATML}
    try:
        for name, family in models.items():
            write_model(arguments.out / name, family)
        counts = write_data(arguments.out / "data", arguments.seed)
    except OSError as error:
        parser.exit(1, f"error: cannot write {arguments.out}: {error.strerror or error}\n")
    for name, family in models.items():
        print(f"{arguments.out}/{name}: Llama configuration and tokenizer, {len(family.vocabulary)} tokens")
    for name, count in counts.items():
        print(f"{arguments.out}/data/{name}.jsonl: {count} rows")


if __name__ == "__main__":
    main()
