"""The verifier of the quickstart task: chains of arithmetic modulo 10, one step a line, then `#result`."""

import re
from typing import Any

from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.outcome import Outcome, Span

PROMPT = re.compile(r"(\d)((?:[-+*]\d)+)\?")
ANSWER = re.compile(r"#(\d)")


def chain_answer(sample: dict[str, Any], source: VerifierSource) -> Outcome:
    """`right` where the last line is `#` and the label's digit, `wrong` for another digit, `unparsable` for none.

    Only the final digit is rewarded. Metrics: correct, parsable, path_correct (every line right as well),
    first_wrong_step (the index of the first wrong step; the number of steps where all are right). Spans: 1 for
    a line that follows from the prompt and from the line before it, else 0.
    """
    prompt = (
        PROMPT.fullmatch(str(sample["messages"][-1].get("content")).strip()) if sample["messages"] else None
    )
    if prompt is None:
        return Outcome("error", error="chain_answer: the prompt is no chain such as 3+8*2-9+5?")
    if not re.fullmatch(r"\d", str(sample["label"])):
        return Outcome("error", error=f"chain_answer: the label must be one digit, not {sample['label']!r}")
    steps = re.findall(r"([-+*])(\d)", prompt.group(2))
    response = sample["response"].rstrip("\n")
    spans = _check_lines(response, int(prompt.group(1)), steps)
    right_steps = [span.score for span in spans[: len(steps)]]
    right_steps += [0.0] * (len(steps) - len(right_steps))

    answer = ANSWER.fullmatch(response.rpartition("\n")[2])
    correct = answer is not None and answer.group(1) == str(sample["label"])
    path_correct = correct and all(span.score for span in spans)
    metrics = {
        "correct": float(correct),
        "parsable": float(answer is not None),
        "path_correct": float(path_correct),
        "first_wrong_step": float([*right_steps, 0.0].index(0.0)),
    }
    score = source.unparsable if answer is None else source.right if correct else source.wrong
    return Outcome("ok", score, spans, metrics)


def _check_lines(response: str, start: int, steps: list[tuple[str, str]]) -> list[Span]:
    """A span for each line. A step must go on from the value that the line before it wrote, right or wrong."""
    spans: list[Span] = []
    value: int | None = start
    offset = 0
    for index, line in enumerate(response.split("\n")):
        if index < len(steps):
            op, digit = steps[index]
            expected = None if value is None else f"{value}{op}{digit}={_apply(value, op, int(digit))}"
            value = int(line[-1]) if re.fullmatch(r"\d[-+*]\d=\d", line) else None
        else:
            expected = f"#{value}" if index == len(steps) and value is not None else None
        spans.append(Span(offset, offset + len(line), float(line == expected)))
        offset += len(line) + 1
    return spans


def _apply(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10
