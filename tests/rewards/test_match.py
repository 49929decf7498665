"""Prompts found again by their text: the measured cases, and what must never match."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from rlhfctl.rewards.match import STAGES, Matcher, first_stage


@pytest.fixture(scope="module")
def truth(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "tokenizers" / "prompt-match.json").read_text())


def test_stages_of_every_case(truth: dict[str, Any]) -> None:
    assert len(truth["cases"]) == 554
    for case in truth["cases"]:
        stated = case["first_normalisation_that_matches"]
        assert first_stage(case["original"], case["decoded"]) == (None if stated == "none" else stated), case
    assert {case["first_normalisation_that_matches"] for case in truth["cases"]} <= {*STAGES, "none"}


@pytest.mark.parametrize("fuzzy", [False, True])
def test_what_must_not_match(truth: dict[str, Any], fuzzy: bool) -> None:
    assert len(truth["must_not_match"]) == 12
    for left, right in truth["must_not_match"]:
        for prompt, query in (
            (left, right),
            (right, left),
            (left, f"<s> {right}</s>"),
            (right, f"<s> {left}</s>"),
        ):
            assert Matcher([prompt], fuzzy=fuzzy).find(query) is None, (prompt, query)
            matcher = Matcher([prompt, query.strip("</s> ")], fuzzy=fuzzy)
            found = matcher.find(query)
            assert found is None or matcher.prompts[found.index] != prompt, (prompt, query)


def test_rows_are_never_confused(truth: dict[str, Any]) -> None:
    """All prompts as rows, all decoded texts as queries: the right row or none, and the rate is reported."""
    names, prompts = list(truth["prompts"]), list(truth["prompts"].values())
    exact, fuzzy = Matcher(prompts), Matcher(prompts, fuzzy=True)
    for case in truth["cases"]:
        for matcher in (exact, fuzzy):
            found = matcher.find(case["decoded"])
            if found is not None:
                same = {case["prompt"], *(("nfc", "nfd") if case["prompt"] in ("nfc", "nfd") else ())}
                assert names[found.index] in same, case
    unrepaired = sum(case["first_normalisation_that_matches"] == "none" for case in truth["cases"])
    assert exact.misses >= unrepaired
    assert fuzzy.rate > exact.rate > 0.8
    assert set(fuzzy.stages) <= {*STAGES, "fuzzy"}


def test_a_tokenizer_at_hand_needs_no_guessing(truth: dict[str, Any], shared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers" / "bert-base-uncased" / "tokenizer.json"))

    def recode(prompt: str) -> str:
        return str(tokenizer.decode(tokenizer.encode(prompt).ids))

    prompts = {
        name: text for name, text in truth["prompts"].items() if name != "nfd"
    }  # the same as nfc to BERT
    matcher = Matcher(list(prompts.values()), recode=recode)
    for row, prompt in enumerate(prompts.values()):
        found = matcher.find(recode(prompt))
        assert found is not None
        assert (found.index, found.stage) == (row, "recoded")
    assert matcher.rate == 1.0


def test_two_rows_that_look_alike_are_no_match() -> None:
    assert Matcher(["a  b", "a b "]).find("a   b") is None
    assert Matcher(["What is 12 + 30?", "What is 13 + 30?"], fuzzy=True).find("What is 12 +  30?").index == 0


@pytest.mark.parametrize(
    ("prompt", "other", "decoded"),
    [
        ("Add 1 2 and 3.", "Add 12 and 3.", "add 1 2 and 3 ."),
        ("What is 5\u00b2?", "What is 52?", "what is 5\u00b2 ?"),
        ("Half of 1\u00bd?", "Half of 11\u20442?", "half of 1\u00bd?"),
        ("Is x\u00b2 > \uff11\uff12?", "Is x\u00b2 > 1 2?", "is x2 > 12?"),
    ],
)
def test_other_numbers_are_no_match(prompt: str, other: str, decoded: str) -> None:
    for fuzzy in (False, True):
        assert Matcher([prompt], fuzzy=fuzzy).find(other) is None
        assert Matcher([other], fuzzy=fuzzy).find(prompt) is None
        assert Matcher([prompt], fuzzy=fuzzy).find(decoded) is not None


def test_a_prompt_that_ends_in_a_marker() -> None:
    assert Matcher(["What closes </s>", "What closes"]).find("What closes </s>").index == 0


def test_fuzzy_forgives_only_what_decoding_loses() -> None:
    prompt = "Explain the token <|im_end|> in ChatML."
    assert Matcher([prompt]).find("Explain the token  in ChatML.") is None
    assert Matcher([prompt], fuzzy=True).find("Explain the token  in ChatML.").stage == "fuzzy"
    assert Matcher([prompt], fuzzy=True).find("Explain the word  in ChatML.") is None
    broken = "Wie gro\ufffd ist 12?"
    assert Matcher(["Wie gro\u00df ist 12?"], fuzzy=True).find(broken).stage == "fuzzy"
    assert Matcher(["Wie gro\u00df ist 13?"], fuzzy=True).find(broken) is None
