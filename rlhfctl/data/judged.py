"""Rows that carry a judgement, for reward models and offline training: one adapter per format, as in adapters.py.

preference     one prompt, a better and a worse answer, with or without a margin
hh_transcript  two transcripts, chosen and rejected
stepwise       one prompt, the steps of an answer, and which of them are right
trajectory     one prompt, an answer and its reward (or a mark: good or bad)

prm800k, math_shepherd and gsm8k_solutions are published layouts (native.py), as are rm_bench, auto_j and panda_lm
(native_pairs.py).
"""

import sys
from collections.abc import Callable
from typing import Any

from rlhfctl.data.adapters import MESSAGES_COLUMNS, RESPONSE_COLUMNS, Row, first_of, take_id, with_system
from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.native import gsm8k_solutions, math_shepherd, prm800k
from rlhfctl.data.native_pairs import auto_j, panda_lm, rm_bench
from rlhfctl.data.samples import Judgement, Message, Sample
from rlhfctl.data.templated import chatml_turns
from rlhfctl.data.turns import (
    WEIGHTS,
    check_weights,
    hh_turns,
    messages_from,
    refuse_spoken,
    response_text,
    sharegpt_turns,
    text_or_messages,
)

SIDES = ("chosen_messages", "rejected_messages")
PROMPT_COLUMNS = ("prompt", "question", "problem", *MESSAGES_COLUMNS)
VERDICT_COLUMNS = ("response_A", "response_B", "label")
VERDICTS = {"A>B": ("response_A", "response_B"), "B>A": ("response_B", "response_A")}
Judged = tuple[list[Message], str, Any, Judgement]


def adapt_judged(row: Row, format: str, system: str | None = None, separator: str = "\n") -> Sample:
    """A sample with its judgement. `system` is put before conversations that have no system message.

    separator: what stands between the steps of an answer that the row holds in parts only."""
    rest = dict(row)
    identity = take_id(rest, row)
    messages, response, label, judgement = JUDGED[format](rest, separator)
    if system is not None:
        messages = _under(messages, system)
        if judgement.rejected is not None:
            judgement.rejected = _under(judgement.rejected, system)
    return Sample(identity, messages, response, label, rest, judgement=judgement)


def _under(messages: list[Message], system: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _preference(rest: Row, separator: str) -> Judged:
    if all(column in rest for column in SIDES):  # two whole conversations
        better, worse = (messages_from(rest.pop(column), column) for column in SIDES)
        return _pair(better, worse, rest)
    if all(column in rest for column in VERDICT_COLUMNS) and "chosen" not in rest:
        verdict = rest.pop("label")
        if verdict not in VERDICTS:
            raise BadRow(f"label is {verdict!r}: one of {', '.join(VERDICTS)} says which response is better")
        columns = VERDICTS[verdict]
    else:
        columns = ("chosen", "rejected")
    if missing := [column for column in columns if rest.get(column) is None]:
        raise BadRow(f"has no {missing[0]}")
    given = [rest.pop(column) for column in columns]
    if all(_is_conversation(value) for value in given):
        better, worse = (messages_from(value, column) for value, column in zip(given, columns, strict=True))
        repeated = isinstance(rest.get("prompt"), str) and better[0]["role"] != "assistant"
        if repeated or not rest.get("prompt"):
            rest.pop("prompt", None)
        else:
            prompt = _prompt(rest)
            better, worse = _behind(prompt, better, columns[0]), _behind(prompt, worse, columns[1])
        return _pair(better, worse, rest)
    prompt = _prompt(rest)
    sides: list[list[Message]] = [
        [*prompt, {"role": "assistant", "content": _answer(value, column)}]
        for value, column in zip(given, columns, strict=True)
    ]
    return _pair(sides[0], sides[1], rest)


def _behind(prompt: list[Message], side: list[Message], column: str) -> list[Message]:
    """The conversation with its prompt: repeated inside it, but for a system message, or left out of it."""
    asked, held = ([(m["role"], (m["content"] or "").strip()) for m in each] for each in (prompt, side[:-1]))
    above = next((place for place, (role, _) in enumerate(held) if role != "system"), len(held))
    if asked in (held[: len(asked)], held[above : above + len(asked)]):
        return side
    if asked[0][0] == "system" and held[: len(asked) - 1] == asked[1:]:
        return [prompt[0], *side]
    if side[0]["role"] == "assistant":
        return [*prompt, *side]
    raise BadRow(f"{column} does not begin with its prompt")


def _hh_transcript(rest: Row, separator: str) -> Judged:
    if missing := [column for column in ("chosen", "rejected") if column not in rest]:
        raise BadRow(f"has no {missing[0]}: one transcript alone says nothing about which is better")
    return _pair(hh_turns(rest.pop("chosen"), "chosen"), hh_turns(rest.pop("rejected"), "rejected"), rest)


def _pair(better: list[Message], worse: list[Message], rest: Row) -> Judged:
    worse, better = with_system(worse, dict(rest)), with_system(better, rest)
    for name, side in (("chosen", better), ("rejected", worse)):
        if side[-1]["role"] != "assistant" or not (side[-1]["content"] or "").strip():
            raise BadRow(f"{name} does not end with an assistant's text")
        if len(side) == 1:
            raise BadRow(f"{name} has no prompt before the answer")
        refuse_spoken(side[-1], f"the last message of {name}")
    if better == worse:
        raise BadRow("chosen and rejected are the same")
    margin = _number(rest.pop("margin"), "margin") if rest.get("margin") is not None else None
    if margin is not None and margin < 0:
        raise BadRow(
            f"margin is {margin:g}: the rejected answer would be the better one; swap the two, or rename the column "
            "with data.*.columns to leave it out"
        )
    judgement = Judgement(rejected=worse, margin=margin)
    return better[:-1], better[-1]["content"], rest.pop("label", None), judgement


def _stepwise(rest: Row, separator: str) -> Judged:
    if "completions" not in rest or "labels" not in rest:
        raise BadRow("has no completions or no labels")
    prompt = _prompt(rest)
    steps, labels = _steps(rest.pop("completions"), "completions"), rest.pop("labels")
    if not isinstance(labels, list) or len(labels) != len(steps):
        count = len(labels) if isinstance(labels, list) else "no"
        raise BadRow(f"has {len(steps)} completions and {count} labels")
    marks = [_probability(label, f"labels[{index}]") for index, label in enumerate(labels)]
    if all(mark is None for mark in marks):
        raise BadRow("labels no step")
    reward = _number(rest.pop("reward"), "reward") if rest.get("reward") is not None else None
    judgement = Judgement(reward=reward, steps=steps, step_labels=marks, separator=separator)
    return prompt, separator.join(steps), rest.pop("label", None), judgement


def _trajectory(rest: Row, separator: str) -> Judged:
    marked = "reward" not in rest and isinstance(rest.get("label"), bool)
    if not marked and rest.get("reward") is None:
        raise BadRow("has no reward")
    reward = _number(rest.pop("label" if marked else "reward"), "reward")
    prompt = _prompt(rest)
    check_weights(prompt)
    column = next((column for column in RESPONSE_COLUMNS if rest.get(column) is not None), None)
    steps = _steps(rest.pop("steps"), "steps") if rest.get("steps") is not None else None
    if column is not None:
        response = response_text(rest.pop(column), column)
    elif steps is not None:
        response = separator.join(steps)
    elif prompt[-1]["role"] == "assistant":
        if any(prompt[-1].get(key) == 0 for key in WEIGHTS):
            raise BadRow("the last message, which its reward is about, has the weight 0")
        response, prompt = response_text(prompt[-1], "the last message"), prompt[:-1]
    else:
        raise BadRow(f"has no answer (looked for {', '.join(RESPONSE_COLUMNS)}, steps)")
    if not prompt:
        raise BadRow("has no prompt before the answer")
    unmatched = steps is not None and separator.join(steps) != response
    if unmatched:
        steps = None  # the answer is what counts; its parts are not found in it
    label = rest.pop("label", None)
    return (
        prompt,
        response,
        label,
        Judgement(reward=reward, steps=steps, separator=separator, unmatched=unmatched),
    )


def _prompt(rest: Row) -> list[Message]:
    column = first_of(rest, PROMPT_COLUMNS, "judged")
    value = rest.pop(column)
    if isinstance(value, str) and (templated := chatml_turns(value)) is not None:
        value = templated
    turns = isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]
    messages = sharegpt_turns(value, column) if turns else text_or_messages(value, column)
    return with_system(messages, rest)


def _answer(value: Any, column: str) -> str:
    """A text, one assistant message, or one ShareGPT turn."""
    turn = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(turn, dict) and "from" in turn:
        value = sharegpt_turns([turn], column)
    return response_text(value, column)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(turn, dict) and "role" in turn for turn in value)
    )


def _steps(value: Any, column: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column} must be a list of texts that is not empty")
    return [response_text(step, f"{column}[{index}]") for index, step in enumerate(value)]


def _number(value: Any, column: str) -> float:
    """A finite number; true and false are 1 and 0."""
    if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise BadRow(f"{column} must be a finite number, not {value!r:.40}")
    return float(value)


def _probability(value: Any, column: str) -> float | None:
    if value is None:
        return None
    number = _number(value, column)
    if not 0.0 <= number <= 1.0:
        raise BadRow(f"{column} must be true, false, null or a number from 0 to 1, not {value!r}")
    return number


JUDGED: dict[str, Callable[[Row, str], Judged]] = {
    "preference": _preference,
    "hh_transcript": _hh_transcript,
    "stepwise": _stepwise,
    "trajectory": _trajectory,
    "prm800k": prm800k,
    "math_shepherd": math_shepherd,
    "gsm8k_solutions": _trajectory,
    "rm_bench": _preference,
    "auto_j": _preference,
    "panda_lm": _preference,
}

# Formats of which one row holds several: what each row is taken apart into first.
SEVERAL: dict[str, Callable[[Row], list[Row]]] = {
    "gsm8k_solutions": gsm8k_solutions,
    "rm_bench": rm_bench,
    "auto_j": auto_j,
    "panda_lm": panda_lm,
}
