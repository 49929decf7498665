"""The final answer of a response in the form in which answers are compared and counted."""

from rlhfctl.rewards.answer_text import final_answer, normalised, number
from rlhfctl.rewards.chain import ANSWER


def extract(verifier: str, response: str) -> str | None:
    """What the verifier of that name reads as the answer; None where it finds none."""
    if verifier.startswith("chain_answer"):
        found = ANSWER.fullmatch(response.rstrip("\n").rpartition("\n")[2])
        return found.group(1) if found else None
    answer = final_answer(response)
    if answer is None:
        return None
    value = number(answer)
    return normalised(answer) if value is None else str(value)
