from typing import Any

import pytest

from rlhfctl.data.adapters import adapt
from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.samples import Sample

USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}


def turns(sample: Sample) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in sample.conversation()]


def test_messages_keep_their_keys_and_the_row_its_columns() -> None:
    row = {"messages": [USER, {**BOT, "loss_weight": 0.0}], "label": {"x": [1]}, "source": "s", "n": None}
    sample = adapt(row, "messages")
    assert sample.messages[1] == {"role": "assistant", "content": "a", "loss_weight": 0.0}
    assert sample.response is None
    assert sample.label == {"x": [1]}
    assert sample.metadata == {"source": "s", "n": None}
    assert sample.prompt() == [USER]


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "value": "two"}, " three"]
    sample = adapt({"messages": [{"role": "user", "content": parts}]}, "messages")
    assert sample.messages[0]["content"] == "one two three"


def test_tool_turns() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "7", "tool_call_id": "c1"},
            BOT,
        ]
    }
    sample = adapt(row, "messages")
    assert sample.messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert sample.messages[2] == {"role": "tool", "content": "7", "tool_call_id": "c1"}


def test_sharegpt_roles_and_calls() -> None:
    row = {
        "id": 7,
        "system": "be brief",
        "tools": "[]",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "a"},
        ],
    }
    sample = adapt(row, "sharegpt")
    assert turns(sample) == [
        ("system", "be brief"),
        ("user", "q"),
        ("assistant", ""),
        ("tool", "7"),
        ("assistant", "a"),
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert sample.messages[2]["tool_calls"] == [call]
    assert (sample.id, sample.metadata) == ("7", {"tools": "[]"})


def test_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["h", "g"]], "lang": "en"}
    sample = adapt(row, "alpaca", system="s")
    assert turns(sample) == [
        ("system", "s"),
        ("user", "h"),
        ("assistant", "g"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]
    assert sample.response == "3"
    assert sample.metadata == {"lang": "en"}
    assert turns(adapt({"instruction": "Hi", "input": "", "output": "x"}, "alpaca"))[0] == ("user", "Hi")


def test_prompt_response() -> None:
    assert turns(adapt({"prompt": "q", "completion": "a"}, "prompt_response")) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    listed = adapt({"prompt": [USER, BOT, USER], "response": [BOT], "rejected": [1]}, "prompt_response")
    assert [role for role, _ in turns(listed)] == ["user", "assistant", "user", "assistant"]
    assert (listed.response, listed.metadata) == ("a", {"rejected": [1]})
    alone = adapt({"prompt": "q", "label": 3}, "prompt_response")
    assert (alone.response, alone.label, alone.prompt()) == (None, 3, [USER])


def test_a_response_with_tool_calls_or_reasoning_keeps_them() -> None:
    for extra in ({"tool_calls": [{"function": {"name": "f"}}]}, {"reasoning_content": "r"}):
        for completion in ({**BOT, **extra}, [{**BOT, **extra}]):
            sample = adapt({"prompt": [USER], "completion": completion, "label": 1}, "prompt_response")
            assert sample.conversation() == [USER, {**BOT, **extra}]
            assert (sample.prompt(), sample.label, sample.metadata) == ([USER], 1, {})
    with pytest.raises(BadRow, match="output holds tool_calls beside the text"):
        adapt({"instruction": "i", "output": {**BOT, "tool_calls": [{"x": 1}]}}, "alpaca")


@pytest.mark.parametrize(
    ("row", "format"),
    [({"messages": [USER]}, "messages"), ({"question": USER["content"], "answer": "1"}, "qa")],
)
def test_a_system_column_is_the_system_message(row: dict[str, Any], format: str) -> None:
    sample = adapt({"system": "own", **row}, format, system="recipe")
    assert sample.messages == [{"role": "system", "content": "own"}, USER]
    assert sample.metadata == {}


def test_system_of_the_recipe_does_not_replace_the_rows_own() -> None:
    row = {"messages": [{"role": "system", "content": "own"}, USER]}
    assert adapt(row, "messages", system="recipe").messages[0]["content"] == "own"


def test_hh_transcript() -> None:
    text = "\n\nHuman: first \n\nAssistant: one\n\ntwo\n\nHuman: 2nd\n\nAssistant: end"
    sample = adapt({"chosen": text, "rejected": "r"}, "hh_transcript")
    assert turns(sample) == [
        ("user", "first"),
        ("assistant", "one\n\ntwo"),
        ("user", "2nd"),
        ("assistant", "end"),
    ]
    assert sample.metadata == {"rejected": "r"}


@pytest.mark.parametrize(
    ("row", "question", "label", "response"),
    [
        ({"question": "q", "answer": "work #### 4"}, "q", "work #### 4", "work #### 4"),
        ({"question": "q", "answer_cot": "so 4", "answer_value": "4.0"}, "q", "4.0", "so 4"),
        ({"problem": "p", "solution": "is \\boxed{4}", "answer": "4"}, "p", "4", "is \\boxed{4}"),
        ({"input": "i", "target": 4.0}, "i", 4.0, "4.0"),
        ({"input": "i", "target": 0}, "i", 0, "0"),
        ({"body": "b.", "question": "q?", "answer": "9 (apples)"}, "b. q?", "9 (apples)", "9 (apples)"),
        (
            {"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "B"},
            "q\nA)1\nB)2",
            "B",
            "r",
        ),
        (
            {"question": "q", "options": {"B": "y", "A": "x", "C": None}, "answer": "A"},
            "q\nA) x\nB) y",
            "A",
            "A",
        ),
        (
            {
                "question": "q",
                "options": [{"key": "A", "value": "x"}, {"key": "B", "value": 2}],
                "answer": "A",
            },
            "q\nA) x\nB) 2",
            "A",
            "A",
        ),
    ],
)
def test_qa(row: dict[str, Any], question: str, label: Any, response: str) -> None:
    sample = adapt(row, "qa")
    assert sample.messages == [{"role": "user", "content": question}]
    assert (sample.label, sample.response) == (label, response)


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
@pytest.mark.parametrize("weight", [0.5, 2, -1, "1"])
def test_a_weight_of_a_message_that_is_neither_0_nor_1_is_refused(weight: Any, key: str) -> None:
    for given in (0, 1, 0.0, 1.0, None):
        adapt({"messages": [USER, {**BOT, key: given}]}, "messages")
    adapt({"messages": [{**USER, key: 0.5}, BOT]}, "messages")
    with pytest.raises(BadRow, match=f"message 2 has {key} {weight!r}: only 0 and 1 are trained"):
        adapt({"messages": [USER, {**BOT, key: weight}]}, "messages")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: weight}]
    with pytest.raises(BadRow, match=f"message 2 has {key}"):
        adapt({"conversations": turns}, "sharegpt")


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_the_weight_of_a_response_given_as_a_message_is_kept(key: str) -> None:
    sample = adapt({"prompt": "q", "response": {**BOT, key: 0}}, "prompt_response")
    assert sample.conversation()[-1] == {**BOT, key: 0}


def test_given_ids_win_and_hashes_ignore_order_and_system() -> None:
    assert adapt({"item_id": "svamp_0", "question": "q", "answer": "1"}, "qa").id == "svamp_0"
    assert adapt({"id": 0, "question": "q", "answer": "1"}, "qa").id == "0"
    hashed = adapt({"question": "q", "answer": "1"}, "qa").id
    assert hashed == adapt({"answer": "1", "question": "q", "id": None}, "qa", system="s").id
    assert hashed != adapt({"question": "q", "answer": "2"}, "qa").id
    assert len(hashed) == 16


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("messages", {"messages": []}, "messages must be a list of messages that is not empty"),
        ("messages", {"messages": "q"}, "messages must be a list of messages that is not empty"),
        ("messages", {"text": "q"}, "has none of the columns that messages rows have"),
        ("messages", {"messages": [USER, {"content": "a"}]}, r"messages\[1\] has no 'role'"),
        ("messages", {"messages": [USER, "a"]}, r"messages\[1\] has no 'role'"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant"}]},
            r"messages\[1\] \(assistant\) has empty content",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": 3}]},
            "must be a text or a list of parts, not int",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part of type 'image'",
        ),
        ("messages", {"messages": [{**USER, "tool_calls": "f"}]}, "tool_calls must be a list"),
        ("messages", {"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
        ("qa", {"id": "x", "question": "q", "answer": "1", "note": ["\udc00"]}, "half of a surrogate pair"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator'"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "has no 'from'"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            "whose value is not JSON",
        ),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}, "without a name"),
        ("alpaca", {"instruction": " ", "output": "x"}, "instruction is empty"),
        ("alpaca", {"instruction": "q", "input": [], "output": "x"}, "input must be a text"),
        ("alpaca", {"instruction": "q", "output": " "}, "output is empty"),
        ("alpaca", {"instruction": "q", "output": 3}, "output must be a text, not int"),
        ("alpaca", {"instruction": "q", "output": "x", "history": ["ab"]}, r"history\[0\] must be a pair"),
        ("prompt_response", {"response": "a"}, "has no prompt"),
        ("prompt_response", {"prompt": "q", "response": None}, "response is empty"),
        ("prompt_response", {"prompt": "q", "response": [USER]}, "must be a text or one assistant message"),
        ("hh_transcript", {"chosen": "Hello"}, 'does not start with "\\\\n\\\\nHuman:"'),
        ("hh_transcript", {"chosen": "\n\nHuman: a\n\nHuman: b"}, "two Human turns in a row"),
        (
            "hh_transcript",
            {"chosen": "\n\nHuman: a\n\nAssistant:"},
            r"turn 2 \(assistant\) has empty content",
        ),
        ("qa", {"question": "q", "answer": ""}, "has no answer"),
        ("qa", {"question": "", "answer": "1"}, "question is empty"),
        ("qa", {"q": "", "answer": "1"}, "has none of the columns question, problem, input"),
    ],
)
def test_bad_rows(format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        adapt(row, format)
