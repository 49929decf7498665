"""Answers of reasoning in prose, as ReFT writes them: what follows the last "\\nTherefore, the answer is: "."""

import math
from typing import Any

from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.outcome import Outcome

MARK = "\nTherefore, the answer is: "
TOLERANCE = 1e-2  # absolute: |answer - reference|, with room for the rounding of binary fractions
LONGEST = 300  # characters of an answer


def ncot_text(response: str) -> str | None:
    """The text after the last mark; None where there is no mark or nothing behind it.

    Nothing else is tolerated: no other wording, no currency and no thousands commas."""
    _, mark, after = response.rpartition(MARK)
    text = after.strip()
    return text if mark and text and len(text) <= LONGEST else None


def finite(text: str) -> float | None:
    """float(text), None where it is no number, or none that can be compared (nan, inf)."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def option(text: str) -> str:
    """A multiple-choice answer for comparison: lower case, without quotes."""
    return text.strip().strip("'\"").strip().lower()


def reference_number(label: Any) -> float | None:
    """The number a label stands for, thousands commas taken out; None for anything else, such as an option's letter."""
    return None if isinstance(label, bool) else finite(str(label).replace(",", ""))


def equal(answer: float, reference: float) -> bool:
    return abs(answer - reference) <= TOLERANCE + 1e-9


def ncot_answer(sample: dict[str, Any], source: VerifierSource) -> Outcome:
    """Metrics: correct, parsable. Where the label is a number the answer must be one, within 0.01; another label is
    compared as text, and any text counts as an answer."""
    if not str(sample["label"]).strip():
        return Outcome("error", error="ncot_answer: the label is empty")
    reference = reference_number(sample["label"])
    text = ncot_text(sample["response"])
    if reference is None:
        parsable = text is not None
        correct = text is not None and option(text) == option(str(sample["label"]))
    else:
        answer = None if text is None else finite(text)
        parsable = answer is not None
        correct = answer is not None and equal(answer, reference)
    return judged(source, parsable, correct)


def judged(
    source: VerifierSource, parsable: bool, correct: bool, metrics: dict[str, float] | None = None
) -> Outcome:
    """right, wrong or unparsable."""
    score = source.right if correct else source.wrong if parsable else source.unparsable
    return Outcome(
        "ok", score, metrics={"correct": float(correct), "parsable": float(parsable), **(metrics or {})}
    )
