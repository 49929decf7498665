"""`format: auto`: which adapter a file's columns ask for.

Only layouts whose meaning is plain are taken. Rows that also carry a judgement (a preference, a reward, step
labels) are refused with the line that takes them on purpose: training on the rejected half of them would look
like any other run.
"""

from collections.abc import Callable
from typing import Any

from rlhfctl.data.adapters import HH_COLUMNS, MESSAGES_COLUMNS, RESPONSE_COLUMNS
from rlhfctl.data.judged import PROMPT_COLUMNS, SIDES, VERDICT_COLUMNS
from rlhfctl.data.native import is_gsm8k_solutions, is_math_shepherd, is_prm800k
from rlhfctl.data.native_pairs import is_auto_j, is_panda_lm, is_rm_bench
from rlhfctl.data.qa import QA_COLUMNS
from rlhfctl.errors import Refused

Row = dict[str, Any]


def detect_judged(row: Row, path: str) -> str:
    """The format of a file whose rows carry a judgement, by its first row. Raises Refused with what to set."""
    for format, matches in JUDGED_DETECTORS.items():
        if matches(row):
            return format
    raise Refused(
        f"{path}: no format with a judgement fits the columns {', '.join(row) or '(none)'}; set data.*.format to one "
        f"of {', '.join(JUDGED_DETECTORS)}, and rename columns with data.*.columns: {{theirs: ours}}"
    )


def detect_format(row: Row, path: str) -> str:
    """The format of a file by its first row, after `columns` has renamed. Raises Refused with what to set."""
    if refusal := _judged_rows(row):
        raise Refused(f"{path}: {refusal}")
    for format, matches in DETECTORS.items():
        if matches(row):
            return format
    raise Refused(
        f"{path}: no format fits the columns {', '.join(row) or '(none)'}; set data.*.format to one of "
        f"{', '.join(DETECTORS)}, and rename columns with data.*.columns: {{theirs: ours}}"
    )


def _judged_rows(row: Row) -> str | None:
    if "completions" in row and "labels" in row:
        return "these are step-labelled rows (prompt, completions, labels), which sft and ppo do not train on (rm does)"
    for name, matches in (("prm800k", is_prm800k), ("math_shepherd", is_math_shepherd)):
        if matches(row):
            return (
                f"these are step-labelled rows ({name}), which sft and ppo do not train on (rm and oreo do)"
            )
    if is_gsm8k_solutions(row):
        return (
            "these are solutions of several models, right and wrong ones alike, which rm and oreo train on; to train "
            "on the questions set format: prompt_response and columns: {question: prompt, ground_truth: response}"
        )
    if "chosen" in row and "rejected" in row and not _is_transcript(row["chosen"]):
        return (
            "these are preference pairs (chosen, rejected); to train on the chosen answers set "
            "format: prompt_response and columns: {chosen: response}"
        )
    if "reward" in row and "prompt" in row and ("response" in row or "steps" in row):
        return (
            "these are scored trajectories (prompt, response, reward), right and wrong ones alike; to train "
            "on all of them set format: prompt_response"
        )
    if isinstance(row.get("label"), bool) and _turn_key(row, "role"):
        return (
            "these rows are marked good or bad (label is true or false); to train on all of them set "
            "format: messages"
        )
    return None


def _turn_key(row: Row, key: str) -> bool:
    for column in MESSAGES_COLUMNS:
        turns = row.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and key in turns[0]:
            return True
    return False


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:")


def _is_qa(row: Row) -> bool:
    return any(
        isinstance(row.get(question), str) and any(answer in row for answer in answers)
        for question, (answers, _) in QA_COLUMNS.items()
    )


def _is_prompt_response(row: Row) -> bool:
    """A prompt alone is enough for RL, unless the row has columns that might be its answer."""
    if not isinstance(row.get("prompt"), (str, list)):
        return False
    return any(column in row for column in RESPONSE_COLUMNS) or set(row) <= {
        "prompt",
        "id",
        "system",
        "label",
    }


DETECTORS: dict[str, Callable[[Row], bool]] = {
    "messages": lambda row: _turn_key(row, "role"),
    "sharegpt": lambda row: _turn_key(row, "from"),
    "hh_transcript": lambda row: any(_is_transcript(row.get(column)) for column in HH_COLUMNS),
    "alpaca": lambda row: "instruction" in row and "output" in row,
    "prompt_response": _is_prompt_response,
    "qa": _is_qa,
}


def _is_preference(row: Row) -> bool:
    if all(column in row for column in SIDES):
        return True
    if all(column in row for column in VERDICT_COLUMNS):
        return True
    return "chosen" in row and "rejected" in row


def _is_trajectory(row: Row) -> bool:
    answered = any(column in row for column in (*RESPONSE_COLUMNS, "steps"))
    if "reward" in row:
        return any(column in row for column in PROMPT_COLUMNS) and (answered or _turn_key(row, "role"))
    return isinstance(row.get("label"), bool) and (
        _turn_key(row, "role") or _turn_key(row, "from") or ("prompt" in row and answered)
    )


JUDGED_DETECTORS: dict[str, Callable[[Row], bool]] = {
    "hh_transcript": lambda row: _is_transcript(row.get("chosen")) and _is_transcript(row.get("rejected")),
    "prm800k": is_prm800k,
    "math_shepherd": is_math_shepherd,
    "gsm8k_solutions": is_gsm8k_solutions,
    "rm_bench": is_rm_bench,
    "auto_j": is_auto_j,
    "panda_lm": is_panda_lm,
    "preference": _is_preference,
    "stepwise": lambda row: "completions" in row and "labels" in row,
    "trajectory": _is_trajectory,
}
