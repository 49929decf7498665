"""Rows with a judgement: what each format becomes, and what is refused with which words."""

from typing import Any

import pytest

from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.detect import detect_judged
from rlhfctl.data.judged import adapt_judged
from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import DataSource

USER = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}

CALL = {"tool_calls": [{"x": 1}]}


def both(row: dict[str, Any], format: str = "preference", **keys: str) -> tuple[list, list]:
    sample = adapt_judged(row, format, **keys)
    assert sample.judgement is not None
    assert sample.judgement.rejected is not None
    return sample.conversation(), sample.judgement.rejected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"question": "q", "response_A": "bad", "response_B": "good", "label": "B>A"},
        {"question": "q", "response_A": "good", "response_B": "bad", "label": "A>B"},
    ],
)
def test_preference_in_all_its_forms(row: dict[str, Any]) -> None:
    assert detect_judged(row, "f") == "preference"
    assert both(row) == ([USER, GOOD], [USER, BAD])
    system = {"role": "system", "content": "s"}
    assert both(row, system="s") == ([system, USER, GOOD], [system, USER, BAD])


SYSTEM = {"role": "system", "content": "s"}
LOOK, FOUND = {"role": "assistant", "content": "look it up"}, {"role": "tool", "content": "found"}


@pytest.mark.parametrize(
    ("row", "before"),
    [
        (
            {"prompt": [USER], "chosen": [LOOK, FOUND, GOOD], "rejected": [LOOK, FOUND, BAD]},
            [USER, LOOK, FOUND],
        ),
        ({"prompt": "q", "chosen": [LOOK, USER, GOOD], "rejected": [LOOK, USER, BAD]}, [USER, LOOK, USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM, USER]),
        ({"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        ({"system": "s", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM, USER]),
        ({"system": "s", "chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, [SYSTEM, USER]),
        ({"system": "s", "prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [SYSTEM, USER]),
    ],
)
def test_whole_conversations_have_their_prompt_and_system_message(
    row: dict[str, Any], before: list[dict[str, Any]]
) -> None:
    assert both(row) == ([*before, GOOD], [*before, BAD])
    assert adapt_judged(row, "preference").metadata == {}


def test_a_conversation_that_goes_on_from_another_prompt() -> None:
    other = {"role": "user", "content": "another question"}
    with pytest.raises(BadRow, match="chosen does not begin with its prompt"):
        both({"prompt": [other, LOOK, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]})


def test_margin_metadata_and_id() -> None:
    row = {"id": 7, "prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "model": "x", "label": "l"}
    sample = adapt_judged(row, "preference")
    assert sample.judgement is not None
    assert (sample.id, sample.judgement.margin, sample.label) == ("7", 2.0, "l")
    assert sample.metadata == {"model": "x"}
    row.pop("margin")
    unmarked = adapt_judged(row, "preference")
    assert unmarked.judgement is not None
    assert unmarked.judgement.margin is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "has no rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected is empty"),
        ({"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d"]}, r"chosen\[0\] has no 'role'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "margin must be a finite number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin must be a finite"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": -0.5},
            "margin is -0.5: the rejected answer",
        ),
        ({"chosen": "a", "rejected": "b"}, "none of the columns"),
        ({"chosen": [USER, GOOD], "rejected": [USER, USER]}, "rejected does not end with an assistant"),
        ({"question": "q", "response_A": "a", "response_B": "b", "label": 1}, "label is 1: one of A>B, B>A"),
        (
            {"chosen": [USER, {**GOOD, **CALL}], "rejected": [USER, {**GOOD, "tool_calls": [{"x": 2}]}]},
            "the last message of chosen holds tool_calls beside the text",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": [{**BAD, "reasoning_content": "b"}]},
            "rejected holds reasoning_content beside the text",
        ),
    ],
)
def test_bad_preferences(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        adapt_judged(row, "preference")


def test_tool_calls_before_the_answer_and_empty_keys_stay() -> None:
    asked = [USER, {**BAD, **CALL}, {"role": "tool", "content": "7"}]
    better, _ = both({"chosen": [*asked, {**GOOD, "tool_calls": []}], "rejected": [*asked, BAD]})
    assert better[1]["tool_calls"] == [{"x": 1}]


def test_transcripts_are_pairs() -> None:
    row = {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    }
    assert detect_judged(row, "f") == "hh_transcript"
    assert both(row, "hh_transcript") == ([USER, GOOD], [USER, BAD])
    with pytest.raises(BadRow, match="has no rejected"):
        adapt_judged({"chosen": row["chosen"]}, "hh_transcript")


def test_stepwise() -> None:
    row = {
        "prompt": "q",
        "completions": ["a", "b", "c"],
        "labels": [True, 0.25, None],
        "final_correct": False,
    }
    assert detect_judged(row, "f") == "stepwise"
    sample = adapt_judged(row, "stepwise")
    assert sample.judgement is not None
    assert (sample.messages, sample.response) == ([USER], "a\nb\nc")
    assert sample.judgement.steps == ["a", "b", "c"]
    assert sample.judgement.step_labels == [1.0, 0.25, None]
    assert sample.judgement.reward is None
    scored = adapt_judged(row | {"reward": True}, "stepwise", separator=" ")
    assert scored.response == "a b c"
    assert scored.judgement is not None
    assert scored.judgement.reward == 1.0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "completions": ["a"], "labels": []}, "has 1 completions and 0 labels"),
        ({"prompt": "q", "completions": ["a"], "labels": True}, "has 1 completions and no labels"),
        ({"prompt": "q", "completions": [], "labels": []}, "completions must be a list"),
        ({"prompt": "q", "completions": ["a"], "labels": [-1]}, r"labels\[0\] must be true, false, null"),
        ({"prompt": "q", "completions": ["a"], "labels": ["+"]}, r"labels\[0\] must be a finite number"),
        ({"prompt": "q", "completions": ["a"], "labels": [None]}, "labels no step"),
        ({"prompt": "q", "completions": ["a", ""], "labels": [1, 1]}, r"completions\[1\] is empty"),
        ({"completions": ["a"], "labels": [1]}, "none of the columns"),
    ],
)
def test_bad_stepwise(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        adapt_judged(row, "stepwise")


@pytest.mark.parametrize(
    ("row", "reward", "steps"),
    [
        ({"prompt": "q", "response": "a\nb", "reward": 0.5}, 0.5, None),
        ({"prompt": "q", "response": "a\nb", "steps": ["a", "b"], "reward": 1}, 1.0, ["a", "b"]),
        ({"prompt": "q", "steps": ["a", "b"], "reward": False}, 0.0, ["a", "b"]),
        ({"prompt": "q", "response": "a\nb", "steps": ["a", "x"], "reward": 1}, 1.0, None),
        ({"messages": [USER, {"role": "assistant", "content": "a\nb"}], "label": True}, 1.0, None),
        ({"conversations": [USER, {"role": "assistant", "content": "a\nb"}], "reward": -3}, -3.0, None),
    ],
)
def test_trajectories(row: dict[str, Any], reward: float, steps: list[str] | None) -> None:
    assert detect_judged(row, "f") == "trajectory"
    sample = adapt_judged(row, "trajectory")
    assert sample.judgement is not None
    assert (sample.messages, sample.response) == ([USER], "a\nb")
    assert (sample.judgement.reward, sample.judgement.steps) == (reward, steps)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "response": "a"}, "has no reward"),
        ({"prompt": "q", "response": "a", "reward": float("inf")}, "reward must be a finite number"),
        ({"prompt": "q", "response": "a", "reward": 10**400}, "reward must be a finite number"),
        ({"prompt": "q", "reward": 1}, "has no answer"),
        ({"messages": [GOOD], "reward": 1}, "has no prompt before the answer"),
        ({"messages": [USER, {**GOOD, **CALL}], "reward": 1}, "the last message holds tool_calls"),
        (
            {"messages": [USER, {**GOOD, "loss_weight": 0}], "reward": 1},
            "its reward is about, has the weight 0",
        ),
        ({"messages": [USER, {**GOOD, "weight": 0.5}], "reward": 1}, "message 2 has weight 0.5"),
    ],
)
def test_bad_trajectories(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        adapt_judged(row, "trajectory")


@pytest.mark.parametrize("row", [{"prompt": "p", "response": "a"}, {"question": "q", "answer": 1}, {"a": 1}])
def test_rows_without_a_judgement_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="no format with a judgement fits the columns"):
        detect_judged(row, "f")


def test_each_kind_of_loading_refuses_the_other_kind_of_format() -> None:
    import json
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
        with pytest.raises(Refused, match="for rm; to train on one side"):
            load_samples([DataSource(path=str(path), format="preference")])
        with pytest.raises(Refused, match="carry no judgement, which rm learns from"):
            load_samples([DataSource(path=str(path), format="prompt_response")], judged=True)
        (sample,) = load_samples([DataSource(path=str(path))], judged=True).samples
        assert sample.origin.endswith("rows.jsonl:1")
