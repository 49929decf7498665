"""The verifier of mathematical answers: numbers by rules of our own, everything else by math-verify.

math-verify bounds itself by signal alarms, which work in the main thread alone; here it runs in a child process
without them, and the child is what has the time limit.
"""

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rlhfctl.install import install_line
from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.answer_text import choice, final_answer, normalised, number, plain, word
from rlhfctl.rewards.child import Child, ChildDied, ChildTimeout
from rlhfctl.rewards.child_loop import Handler, NotReady, serve
from rlhfctl.rewards.number_words import denied, scaled, signed, without_scales
from rlhfctl.rewards.outcome import Outcome

SECONDS = 10.0  # for one comparison by math-verify
TOLERANCE = Fraction(1, 10**6)  # relative; absolute from SMALL to 1
SMALL = Fraction(1, 1000)

# Powers, factorials and digit strings that a computer algebra system would work out for minutes. Refused by rule,
# so that the reward of such an answer does not depend on how fast the machine is.
HUGE = re.compile(r"\^\s*[{(]?\s*-?\d{3}|\*\*|\^[^^]*\^[^^]*\^|!|\d{40}")
PERCENT = re.compile(r"%|\bper ?cent\b", re.I)
BASE = re.compile(r"\d\s*_")  # 10_2, which math-verify takes for 10
IN_BASE = re.compile(r"([0-9a-z]*\d[0-9a-z]*)_{?([0-9]+|[a-z]+)}?")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)")
MATHEMATICS = re.compile(r"[\\^_/*+=(){}\[\]]|\d\s*-|-\s*\d|√|π|pi\b|sqrt|[^\W\d_]\d|\d[^\W\d_]")


class MathAnswer:
    """Callable: sample -> Outcome with metrics `correct` and `parsable`. Holds the child; `close` ends it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._child = Child(__name__, [])

    def __call__(self, sample: dict[str, Any], source: VerifierSource) -> Outcome:
        reference = reference_answer(sample["label"])
        if reference is None:
            return Outcome(
                "error", error=f"math_answer: no answer can be read from the label {sample['label']!r}"
            )
        response = sample["response"].strip()
        # A response that is the reference, whatever that is ("Mrs. Hilt", "5:45"), needs no mark.
        answer = reference if normalised(response) == normalised(reference) else final_answer(response)
        if answer is None:
            return Outcome("ok", source.unparsable, metrics={"correct": 0.0, "parsable": 0.0})
        try:
            correct = self._equal(answer, reference)
            if not correct and scaled(answer):
                question = " ".join(str(message.get("content")) for message in sample["messages"])
                correct = self._equal(without_scales(answer, question), reference)
        except ChildTimeout as error:
            return Outcome("timeout", error=f"math_answer: {error} on {answer!r}")
        except ChildDied as error:
            return Outcome("error", error=f"math_answer: the process that runs math-verify {error}")
        metrics = {"correct": float(correct), "parsable": 1.0}
        return Outcome("ok", source.right if correct else source.wrong, metrics=metrics)

    def _equal(self, answer: str, reference: str) -> bool:
        verdict = equal_by_rules(answer, reference)
        if verdict is not None:
            return verdict
        return bool(self._child.ask({"answer": _latex(answer), "reference": _latex(reference)}, self.seconds))

    def close(self) -> None:
        self._child.close()


def reference_answer(label: Any) -> str | None:
    """The answer that a label stands for: a number, a short text, or a worked solution with a mark."""
    if isinstance(label, bool) or (isinstance(label, (int, float)) and label == label):
        # JSON's 0.00001 is a float that str() calls 1e-05.
        plainly = isinstance(label, float) and math.isfinite(label)
        return f"{Decimal(repr(label)):f}" if plainly else str(label)
    if not isinstance(label, str) or not label.strip():
        return None
    marked = "\n" in label or "####" in label or "\\boxed" in label
    return final_answer(label) if marked else label.strip()


def equal_by_rules(answer: str, reference: str) -> bool | None:
    """True or False where plain rules can tell, None where it takes algebra."""
    if normalised(answer) == normalised(reference):
        return True
    if word(reference) == normalised(reference):
        return word(answer) == word(reference)
    if choice(reference) and len(normalised(reference).strip("()")) == 1:
        return choice(answer) == choice(reference)
    if denied(plain(answer)) and not denied(plain(reference)):
        return False
    right, given = number(reference), number(answer)
    if right is not None and given is not None:
        percent = bool(PERCENT.search(answer))
        if percent != bool(PERCENT.search(reference)) and _close(
            given / 100 if percent else given * 100, right
        ):
            return True
        return _close(given, right) or _rounded(answer, given, right)
    if (scaled(answer) and not scaled(reference)) or (BASE.search(answer) and not BASE.search(reference)):
        return False
    ours, theirs = (IN_BASE.fullmatch(normalised(text)) for text in (answer, reference))
    if ours and theirs:
        return _in_base(ours) == _in_base(theirs)
    if HUGE.search(answer) or not (MATHEMATICS.search(answer) or MATHEMATICS.search(reference)):
        return False
    return None


def _in_base(found: re.Match[str]) -> tuple[str, str]:
    """Digits and base: the same digits in another base are another number."""
    return found[1], str(BASES.get(found[2], found[2]))


def _latex(text: str) -> str:
    """As math-verify reads it: signs as signs, 3 1/2 as a mixed number."""
    return MIXED.sub(r"\1\\frac{\2}{\3}", signed(text).replace("-$", "-"))


def _close(given: Fraction, right: Fraction) -> bool:
    """Small numbers too have to be right to some digits: 0 is not 0.0000004."""
    large = right == 0 or abs(right) >= SMALL
    return abs(given - right) <= TOLERANCE * (max(abs(right), Fraction(1)) if large else abs(right))


def _rounded(answer: str, given: Fraction, right: Fraction) -> bool:
    """3.33 for 3.3333: the reference rounded to the two or more decimals that the answer has."""
    decimals = re.search(r"\.(\d{2,})", answer)
    if not decimals or "/" in answer or scaled(answer) or (given == 0 and right != 0):
        return False
    unit = Fraction(1, 10 ** len(decimals.group(1)))
    return abs(given - right) <= unit / 2


def main(argv: list[str]) -> None:
    """The child."""
    serve(_prepare)


def _prepare() -> Handler:
    import logging

    try:
        from math_verify import parse, verify
    except ImportError:
        raise NotReady(f"needs math-verify for this answer: {install_line('train')}") from None
    logging.disable(logging.ERROR)  # it warns of each missing timeout; the time limit is the parent's

    def handle(request: dict[str, str]) -> bool:
        reference, answer = (
            parse(f"${request[key].strip('$')}$", parsing_timeout=None) for key in ("reference", "answer")
        )
        return bool(reference and answer and verify(reference, answer, timeout_seconds=None))

    return handle
