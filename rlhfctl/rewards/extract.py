"""The answer that a verifier reads out of a text, in one form for equal answers: what votes are counted by."""

import re
from collections.abc import Callable

from rlhfctl.rewards.answer_text import choice, final_answer, normalised, number, word
from rlhfctl.rewards.chain import ANSWER
from rlhfctl.rewards.ncot import finite, ncot_text, option
from rlhfctl.rewards.program import Programs


def chain(text: str) -> str | None:
    answer = ANSWER.fullmatch(text.rstrip("\n").rpartition("\n")[2])
    return answer.group(1) if answer else None


def mathematics(text: str) -> str | None:
    """Numbers as reduced fractions ("1/2"), options as their letter, anything else as normalised text."""
    answer = final_answer(text.strip())
    if answer is None:
        return None
    value = number(answer)
    if value is not None:
        return str(value)
    return choice(answer) or word(answer) or normalised(answer) or None


def ncot(text: str) -> str | None:
    """A number, or one letter (of options); other texts are no answer to vote with."""
    answer = ncot_text(text)
    if answer is None:
        return None
    value = finite(answer)
    if value is not None:
        return canonical(value)
    return option(answer) if re.fullmatch(r"[a-z]", option(answer)) else None


def canonical(value: float) -> str:
    """Equal to the cent, as answers are compared: 3, 3.33."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


PROGRAMS = Programs()  # starts its process with the first program; that one goes when this process does


def program(text: str) -> str | None:
    return programs([text])[0]


def programs(texts: list[str]) -> list[str | None]:
    """As `program`, many at a time. Raises ChildTimeout or ChildDied where the process that runs them fails."""
    return [None if value is None else canonical(value) for value, _ in PROGRAMS.run(texts)]


EXTRACT: dict[str, Callable[[str], str | None]] = {
    "chain_answer": chain,
    "math_answer": mathematics,
    "ncot_answer": ncot,
    "program_answer": program,
}


def extract_all(verifier: str, texts: list[str]) -> list[str | None]:
    """EXTRACT[verifier] of each text; programs run several at a time."""
    if verifier == "program_answer":
        return programs(texts)
    return [EXTRACT[verifier](text) for text in texts]
