import re

import pytest

from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.chain import chain_answer
from rlhfctl.rewards.outcome import Span
from rlhfctl.rewards.verifiers import VerifierReward

SOURCE = VerifierSource(kind="verifier", name="chain_answer", right=1.0, wrong=0.1, unparsable=0.0)
RIGHT = "3+8=1\n1*2=2\n2-9=3\n3+5=8\n#8"


def sample(response: str, label: object = "8", prompt: str = "3+8*2-9+5?") -> dict:
    messages = [{"role": "user", "content": prompt}]
    return {"id": "x", "messages": messages, "response": response, "label": label, "metadata": {}}


# response, score, correct, parsable, path_correct, first_wrong_step, scores of the lines
CASES = [
    (RIGHT, 1.0, 1, 1, 1, 4, [1, 1, 1, 1, 1]),
    (RIGHT + "\n", 1.0, 1, 1, 1, 4, [1, 1, 1, 1, 1]),
    # two slips that cancel: rewarded, but not the right path; the line after a slip goes on from it and is right
    ("3+8=2\n2*2=4\n4-9=5\n5+5=8\n#8", 1.0, 1, 1, 0, 0, [0, 1, 1, 0, 1]),
    ("3+8=1\n1*2=7\n7-9=8\n8+5=3\n#3", 0.1, 0, 1, 0, 1, [1, 0, 1, 1, 1]),
    # the last line does not follow from the steps
    ("3+8=1\n1*2=2\n2-9=3\n3+5=8\n#7", 0.1, 0, 1, 0, 4, [1, 1, 1, 1, 0]),
    ("3+8=1\n1*2=2\n2-9=3\n3+5=9\n#8", 1.0, 1, 1, 0, 3, [1, 1, 1, 0, 0]),
    ("#8", 1.0, 1, 1, 0, 0, [0]),
    ("3+8=1\n#8", 1.0, 1, 1, 0, 1, [1, 0]),
    ("3+8=1\n1*2=2\n2-9=3\n3+5=8\n", 0.0, 0, 0, 0, 4, [1, 1, 1, 1]),
    ("3+8=1\n1*2=2\n2-9", 0.0, 0, 0, 0, 2, [1, 1, 0]),
    (RIGHT + "\n#8", 1.0, 1, 1, 0, 4, [1, 1, 1, 1, 1, 0]),
    ("3+8=1\nfoo\n2-9=3\n3+5=8\n#8", 1.0, 1, 1, 0, 1, [1, 0, 0, 1, 1]),
    (RIGHT[:-2] + "#88", 0.0, 0, 0, 0, 4, [1, 1, 1, 1, 0]),
    ("", 0.0, 0, 0, 0, 0, [0]),
]


@pytest.mark.parametrize(("response", "score", "correct", "parsable", "path", "first", "lines"), CASES)
def test_by_hand(
    response: str, score: float, correct: int, parsable: int, path: int, first: int, lines: list
) -> None:
    outcome = chain_answer(sample(response), SOURCE)
    assert (outcome.status, outcome.score, outcome.error) == ("ok", score, None)
    assert outcome.metrics == {
        "correct": correct,
        "parsable": parsable,
        "path_correct": path,
        "first_wrong_step": first,
    }
    assert [span.score for span in outcome.spans] == lines


def test_spans_are_the_lines() -> None:
    spans = chain_answer(sample(RIGHT), SOURCE).spans
    assert [RIGHT[span.start : span.end] for span in spans] == RIGHT.split("\n")
    assert spans[1] == Span(6, 11, 1.0)


def test_integer_label_and_other_chain_lengths() -> None:
    outcome = chain_answer(sample("4-7=7\n#7", label=7, prompt="4-7?"), SOURCE)
    assert (outcome.score, outcome.metrics["path_correct"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("row", "status", "error"),
    [
        (sample(RIGHT, prompt="What is 3+8?"), "error", "chain_answer: the prompt is no chain such as 3\\+8"),
        (sample(RIGHT, label="12"), "error", "chain_answer: the label must be one digit, not '12'"),
        (sample(RIGHT, label=None), "missing", "chain_answer: the row has no label"),
    ],
)
def test_a_row_that_cannot_be_checked_has_no_score(row: dict, status: str, error: str) -> None:
    (outcome,) = VerifierReward(SOURCE).score([row])
    assert (outcome.status, outcome.score) == (status, None)
    assert outcome.error is not None
    assert re.match(error, outcome.error)
