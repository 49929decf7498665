"""Data sets in the layout that they are published in, as rows with a judgement.

prm800k         a problem and a tree of rated completions: the path that was followed, step by step
math_shepherd   question and steps in one text, each step closed by a tag, and the same text with + or - for each tag
gsm8k_solutions one question with the solutions of several models, each marked right or wrong: one trajectory a model
"""

import re
from typing import Any

from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.samples import Judgement, Message

Row = dict[str, Any]
TAG = "ки"  # what Math-Shepherd closes a step with
FIRST_STEP = re.compile(r"\s*\bStep 1:")
MARKS = {"+": 1.0, "-": 0.0}
FINAL = re.compile(r"(?:\n|^)A:\s*(.+?)\s*$")
FINISHED = {"solution": 1.0, "found_error": 0.0, "give_up": 0.0}


def is_prm800k(row: Row) -> bool:
    question, label = row.get("question"), row.get("label")
    return (
        isinstance(question, dict)
        and "problem" in question
        and isinstance(label, dict)
        and isinstance(label.get("steps"), list)
    )


def is_math_shepherd(row: Row) -> bool:
    return isinstance(row.get("label"), str) and isinstance(row.get("input"), str) and TAG in row["input"]


def is_gsm8k_solutions(row: Row) -> bool:
    return "ground_truth" in row and isinstance(row.get("question"), str) and bool(_solutions(row))


def prm800k(rest: Row, separator: str) -> tuple[list[Message], str, Any, Judgement]:
    """Steps: the chosen completion of each, or the human's where none was, or the first where the row ends there.

    A step is right where its rating is 1 (0 is neutral and not right, -1 is wrong); a human's own has no rating. The
    row's reward is 1 where it ends in a solution, 0 where an error was found or the labeller gave up.
    """
    if not is_prm800k(rest):
        raise BadRow("has no question.problem or no label.steps")
    question, label = rest.pop("question"), rest.pop("label")
    reason = label.get("finish_reason")
    if reason not in FINISHED:
        raise BadRow(f"ends with {reason!r}: the labellers did not say whether it is right")
    steps: list[str] = []
    marks: list[float | None] = []
    for index, step in enumerate(label["steps"]):
        found = _followed(step, index)
        if found is None:
            break
        text, rating = found
        steps.append(text)
        marks.append(None if rating is None else float(rating == 1))
        if step.get("chosen_completion") is None and not step.get("human_completion"):
            break  # nothing follows from a step that nobody chose
    if not steps:
        raise BadRow("label.steps holds no completion")
    rest["finish_reason"] = reason
    judgement = Judgement(reward=FINISHED[reason], steps=steps, step_labels=marks, separator=separator)
    answer = question.get("ground_truth_answer")
    return [_user(question["problem"], "question.problem")], separator.join(steps), answer, judgement


def _followed(step: Any, index: int) -> tuple[str, int | None] | None:
    """Text and rating of the completion that the next step continues; None where the step is empty."""
    completions = (step.get("completions") or []) if isinstance(step, dict) else None
    if completions is None or not all(isinstance(each, dict) for each in completions):
        raise BadRow(f"label.steps[{index}] is no object with completions")
    chosen, human = step.get("chosen_completion"), step.get("human_completion")
    if isinstance(chosen, int) and 0 <= chosen < len(completions):
        taken = completions[chosen]
    elif isinstance(human, dict):
        taken = human
    elif completions:
        taken = completions[0]
    else:
        return None
    text = taken.get("text")
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"label.steps[{index}] holds an empty completion")
    return text, taken.get("rating")


def math_shepherd(rest: Row, separator: str) -> tuple[list[Message], str, Any, Judgement]:
    """The question ends before "Step 1:". A step's mark says whether completions from there reached the answer; the
    last one's is the row's reward."""
    if not is_math_shepherd(rest):
        raise BadRow(f"has no input with {TAG} behind its steps, or no label")
    text, marked = rest.pop("input"), rest.pop("label")
    steps: list[str] = []
    marks: list[float] = []
    place = 0
    parts = text.split(TAG)
    for part in parts[:-1]:
        place = marked.find(part, place)
        mark = marked[place + len(part) : place + len(part) + 1]
        if place < 0 or mark not in MARKS:
            raise BadRow(f"label does not repeat input with + or - at step {len(steps) + 1}")
        steps.append(part.strip())
        marks.append(MARKS[mark])
        place += len(part) + 1
    if parts[-1].strip():
        raise BadRow(f"input goes on behind its last {TAG}")
    border = FIRST_STEP.search(steps[0])
    if border is None or not steps[0][: border.start()].strip():
        raise BadRow("has no question before Step 1:")
    question, steps[0] = steps[0][: border.start()].strip(), steps[0][border.start() :].strip()
    if not all(steps):
        raise BadRow("holds an empty step")
    known: list[float | None] = [*marks]
    judgement = Judgement(reward=marks[-1], steps=steps, step_labels=known, separator=separator)
    return [_user(question, "the question")], separator.join(steps), None, judgement


def gsm8k_solutions(row: Row) -> list[Row]:
    """One `trajectory` row a solution: response, reward and the model's name; label: the number behind `A:`."""
    found = _solutions(row)
    if not found:
        raise BadRow("holds no solution ({solution, is_correct})")
    truth = FINAL.search(str(row.get("ground_truth")))
    if truth is None:
        raise BadRow("ground_truth does not end with A: and the answer")
    given = row.get("id")
    return [
        {
            **({"id": f"{given}/{model}"} if given is not None else {}),
            "prompt": row["question"],
            "response": each["solution"],
            "reward": float(each["is_correct"]),
            "label": re.sub(r"(?<=\d),(?=\d{3})", "", truth.group(1)),
            "model": model,
        }
        for model, each in found.items()
    ]


def _solutions(row: Row) -> dict[str, Row]:
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, dict) and isinstance(value.get("solution"), str) and "is_correct" in value
    }


def _user(text: Any, column: str) -> Message:
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"{column} is empty")
    return {"role": "user", "content": text}
