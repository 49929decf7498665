"""N-CoT answers, and the one form of equal answers that votes are counted by."""

import pytest

from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.extract import EXTRACT, extract_all
from rlhfctl.rewards.ncot import ncot_answer
from rlhfctl.rewards.verifiers import VERIFIERS

SOURCE = VerifierSource(kind="verifier", name="ncot_answer", right=1.0, wrong=0.1, unparsable=0.0)
MARK = "Some steps.\nTherefore, the answer is: "


@pytest.mark.parametrize(
    ("response", "label", "score"),
    [
        (MARK + "5", "5.0", 1.0),
        (MARK + "5.01", 5, 1.0),
        (MARK + "5.02", 5, 0.1),
        (MARK + "1024", "1,024", 1.0),
        (MARK + "1,024", "1,024", 0.0),  # on answers commas are not tolerated
        (MARK + "$5", "5", 0.0),
        (MARK + "5.", "5", 1.0),
        (MARK + "nan", "5", 0.0),
        (MARK + "3" + "\nTherefore, the answer is: 5", "5", 1.0),  # the last one counts
        (MARK + "5" + "\nTherefore, the answer is: ", "5", 0.0),
        ("Therefore, the answer is: 5", "5", 0.0),  # not at the start of a line
        ("The answer is 5", "5", 0.0),
        (MARK + "'B'", "b", 1.0),
        (MARK + "c", "b", 0.1),
        ("no answer", "b", 0.0),
    ],
)
def test_ncot(response: str, label: object, score: float) -> None:
    outcome = ncot_answer({"response": response, "label": label}, SOURCE)
    assert (outcome.status, outcome.score) == ("ok", score)
    assert outcome.metrics == {"correct": float(score == 1.0), "parsable": float(score > 0)}


def test_every_verifier_has_one() -> None:
    assert set(EXTRACT) == set(VERIFIERS)


@pytest.mark.parametrize(
    ("verifier", "text", "answer"),
    [
        ("chain_answer", "3+4=7\n#7\n", "7"),
        ("chain_answer", "#7\n3+4=7", None),
        ("math_answer", "so \\boxed{0.50}", "1/2"),
        ("math_answer", "The answer is 1,024.", "1024"),
        ("math_answer", "Answer: (B)", "b"),
        ("math_answer", "", None),
        ("ncot_answer", MARK + "3.0", "3"),
        ("ncot_answer", MARK + "-0.001", "0"),
        ("ncot_answer", MARK + "3.333", "3.33"),
        ("ncot_answer", MARK + "B", "b"),
        ("ncot_answer", MARK + "two", None),
        ("program_answer", "def solution():\n    return 10 / 3\n", "3.33"),
        ("program_answer", "    return 100\n", "100"),
        ("program_answer", "    retrun 100\n", None),
    ],
)
def test_extract(verifier: str, text: str, answer: str | None) -> None:
    assert EXTRACT[verifier](text) == answer
    assert extract_all(verifier, [text, text]) == [answer, answer]
