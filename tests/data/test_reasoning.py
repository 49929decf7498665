"""The two forms of ReFT's rows, by hand and over the real files; what every gold answer scores."""

import os
from collections import Counter
from pathlib import Path

import pytest

from rlhfctl.data.adapters import adapt
from rlhfctl.data.load import load_samples
from rlhfctl.recipe.sections import DataSource, VerifierSource
from rlhfctl.rewards.sample import reward_sample
from rlhfctl.rewards.verifiers import VerifierReward

SHARED = Path(__file__).resolve().parents[3] / "shared"
real = pytest.mark.skipif(not (SHARED / "data" / "reft").is_dir(), reason="needs ../shared/data")

GSM8K = {
    "question": "How many in May?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 1,024 = <<24+1000=1024>>1,024 clips.\n#### 1,024",
}


def test_prose() -> None:
    sample = adapt(GSM8K, "ncot")
    assert sample.messages[-1]["content"] == "Question:\nHow many in May?\nAnswer reasoning:\n"
    assert sample.response == (
        "She sold 48/2 = 24 clips.\nIn all 1,024 = 1,024 clips.\nTherefore, the answer is: 1024"
    )
    assert sample.label == "1,024"
    svamp = {"question": "q", "answer_cot": "Half.\n\nTherefore, the answer is <6%>.", "answer_value": "6.0"}
    assert adapt(svamp, "ncot").response == "Half.\nTherefore, the answer is: 6"
    assert adapt({"question": "q", "answer_value": "b"}, "ncot").response is None


def test_programs() -> None:
    sample = adapt(GSM8K, "pcot")
    assert sample.messages[-1]["content"] == (
        'Question:\nHow many in May?\nAnswer reasoning:\ndef solution():\n    """How many in May?"""\n'
    )
    assert sample.response == "    step_1 = 48/2\n    step_2 = 24+1000\n    return step_2"
    code = 'def solution():\n    """q"""\n    return 3\n'
    svamp = adapt({"question": "q", "answer_cot": code, "answer_value": "3.0"}, "pcot")
    assert svamp.response == "    return 3"
    other = {"question": "q", "answer": "It is <<1+1=2>>2, less one.\n#### 1"}
    assert adapt(other, "pcot").response is None  # the last mark is not the answer: no program of it


@pytest.mark.parametrize(
    ("answer", "label", "end"),
    [
        ("50%", "50", "50"),
        ("$50", "50", "50"),
        ("50 %", "50", "50"),
        ("$1,234.50", "1,234.50", "1234.50"),
        ("1,024", "1,024", "1024"),
        ("1,024 apples", "1,024 apples", "1,024 apples"),
        ("(1,2)", "(1,2)", "(1,2)"),
        ("3/4", "3/4", "3/4"),
        ("B", "B", "B"),
    ],
)
def test_what_is_taught_is_what_is_right(answer: str, label: str, end: str) -> None:
    sample = adapt({"question": "q", "answer": f"It is <<1+1=2>>so.\n#### {answer}"}, "ncot")
    assert (sample.label, sample.response) == (label, f"It is so.\nTherefore, the answer is: {end}")
    source = VerifierReward(VerifierSource(kind="verifier", name="ncot_answer"))
    (outcome,) = source.score([reward_sample(sample, str(sample.response))])
    assert (outcome.status, outcome.score) == ("ok", 1.0)


@pytest.mark.parametrize(
    ("answer", "label"), [('c ."', "c"), ("1050 ( e )", "e"), ("option D) 61", "D"), ("\\boxed{720}", "720")]
)
def test_an_answer_in_other_words_than_the_label_is_not_taught(answer: str, label: str) -> None:
    row = {"question": "q", "rationale": f"So the answer is: {answer}", "correct": label}
    assert adapt(row, "ncot").response is None


def gold_scores(file: str, format: str, verifier: str, limit: int | None) -> Counter[str]:
    path = str(SHARED / "data" / file)
    samples = load_samples([DataSource(path=path, format=format, limit=limit)]).samples
    source = VerifierReward(VerifierSource(kind="verifier", name=verifier, wrong=0.1))
    written = [sample for sample in samples if sample.response is not None]
    outcomes = source.score([reward_sample(sample, str(sample.response)) for sample in written])
    source.close()
    counts = Counter(str(outcome.score if outcome.status == "ok" else outcome.status) for outcome in outcomes)
    return counts + Counter({"no gold": len(samples) - len(written)})


@real
def test_gold_prose() -> None:
    """SVAMP: two texts end in another number than their label (9 for 8.93, 69.32 for 69.4)."""
    assert gold_scores("reft/svamp_nl.json", "ncot", "ncot_answer", None) == {"1.0": 3074, "0.1": 2}
    assert gold_scores("gsm8k/train.jsonl", "ncot", "ncot_answer", None) == {"1.0": 7473}
    assert gold_scores("gsm8k/test.jsonl", "ncot", "ncot_answer", None) == {"1.0": 791}
    assert gold_scores("math_word/mathqa_1k.jsonl", "ncot", "ncot_answer", None) == {
        "1.0": 17,
        "no gold": 983,
    }
    aqua = gold_scores("math_word/aqua_dev_test.jsonl", "ncot", "ncot_answer", None)
    assert aqua == {"1.0": 33, "no gold": 475}
    assert set(gold_scores("math_word/math500.jsonl", "ncot", "ncot_answer", None)) <= {"1.0", "no gold"}


@real
def test_gold_programs() -> None:
    full = None if os.environ.get("RLHFCTL_ALL_GOLD") else 150
    svamp = gold_scores("reft/svamp_python_sdp.json", "pcot", "program_answer", full)
    gsm8k = gold_scores("gsm8k/train.jsonl", "pcot", "program_answer", full)
    print(svamp, gsm8k)
    assert svamp["1.0"] == sum(svamp.values())
    assert set(gsm8k) <= {"1.0", "no gold"} or full is None
