"""Samples with their verdicts as `trajectory` rows, which oreo and rm train on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfctl.data.encode import tools_of
from rlhfctl.errors import Refused
from rlhfctl.evaluation.results import write_lines

if TYPE_CHECKING:
    from rlhfctl.evaluation.answers import Answer
    from rlhfctl.evaluation.run import Row


def balanced(answers: Sequence["Answer"], most: int | None) -> list[int]:
    """Which samples of a prompt are kept: of the right ones the first `most`, of the wrong ones the first `most`, in
    the order in which they were drawn; all with None. One without a verdict, or without a text, is never kept: there is
    nothing in it to train on."""
    kept, counts = [], {True: 0, False: 0}
    for place, answer in enumerate(answers):
        if answer.correct is None or answer.reward is None or not answer.text.strip():
            continue
        counts[answer.correct] += 1
        if most is None or counts[answer.correct] <= most:
            kept.append(place)
    return kept


def write(
    path: Path, rows: Sequence["Row"], balance: int | None, delimiters: tuple[str, ...]
) -> dict[str, int]:
    """One line a kept sample. balance: at most so many right and so many wrong ones a prompt.

    Raises Refused where all of them are right, or all wrong: they teach nothing."""
    lines, right, truncated, left_out = [], 0, 0, 0
    for row in rows:
        kept = balanced(row.samples, balance)
        left_out += len(row.samples) - len(kept)
        for place in kept:
            answer = row.samples[place]
            right += bool(answer.correct)
            truncated += answer.truncated
            lines.append(trajectory(row, place, delimiters))
    if right in (0, len(lines)):
        kind = "right" if right else "wrong"
        raise Refused(
            f"all {len(lines)} samples are {kind}: there is nothing to learn from; {path} is not written"
        )
    write_lines(path, lines)
    return {
        "rows": len(lines),
        "right": right,
        "wrong": len(lines) - right,
        "truncated": truncated,
        "left_out": left_out,
    }


def trajectory(row: "Row", place: int, delimiters: tuple[str, ...]) -> dict[str, Any]:
    """prompt: the user's text where that is the whole prompt, else its messages. steps: where the one delimiter
    joins them to the response and none is empty. truncated: the response has no end, its reward is about a part. tools:
    where the prompt shows some."""
    sample, answer = row.prompt.sample, row.samples[place]
    messages = sample.prompt()
    alone = (
        len(messages) == 1 and messages[0].get("role") == "user" and set(messages[0]) == {"role", "content"}
    )
    record: dict[str, Any] = {
        "id": f"{sample.id}/{place}",
        "prompt": messages[0]["content"] if alone else messages,
        "response": answer.text,
    }
    if (tools := tools_of(sample)) is not None:
        record["tools"] = tools
    steps = answer.text.split(delimiters[0])
    if len(delimiters) == 1 and all(step.strip() for step in steps):
        record["steps"] = steps
    record |= {"reward": answer.reward, "correct": answer.correct, "truncated": answer.truncated}
    if answer.path_correct is not None:
        record["path_correct"] = answer.path_correct
    return record | {"label": sample.label, "prompt_id": sample.id}


def sentence(path: Path, counts: dict[str, int]) -> str:
    return (
        f"{path}: {counts['rows']} trajectories, {counts['right']} right and {counts['wrong']} wrong"
        f" ({counts['truncated']} truncated, {counts['left_out']} left out)"
    )
