"""Whatever a row holds, an adapter gives a sample that can be encoded, or a BadRow, nothing else."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfctl.data.adapters import ADAPTERS, adapt
from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.detect import detect_format, detect_judged
from rlhfctl.data.judged import JUDGED, adapt_judged
from rlhfctl.errors import Refused

COLUMNS = [
    *(
        "messages",
        "conversations",
        "conversation",
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "prompt",
    ),
    *(
        "response",
        "completion",
        "chosen",
        "rejected",
        "text",
        "question",
        "problem",
        "answer",
        "target",
        "solution",
    ),
    *("body", "options", "id", "label", "tools", "reward", "labels", "completions"),
    *("steps", "margin", "chosen_messages", "rejected_messages", "response_A", "response_B"),
]
KEYS = ["role", "from", "content", "value", "type", "text", "tool_calls", "name", "arguments", "function"]
WORDS = [
    "user",
    "assistant",
    "human",
    "gpt",
    "function_call",
    "system",
    "",
    " ",
    "\n\nHuman: a\n\nAssistant: b",
    "\ud800",
]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), max_size=4)
ROWS = st.dictionaries(st.sampled_from(COLUMNS), VALUES | TURNS, max_size=6)


@pytest.mark.parametrize("format", ADAPTERS)
@settings(max_examples=100)
@given(row=ROWS)
def test_adapters(format: str, row: dict) -> None:
    try:
        sample = adapt(row, format, system="s")
    except BadRow:
        return
    assert sample.id
    assert sample.conversation()
    for message in sample.conversation():
        assert isinstance(message["role"], str)
        assert message["content"] is None or isinstance(message["content"], str)
        assert message["content"] or message.get("tool_calls") or message["role"] == "system"
        (message["content"] or "").encode()


@pytest.mark.parametrize("format", JUDGED)
@settings(max_examples=100)
@given(row=ROWS)
def test_judged_adapters(format: str, row: dict) -> None:
    try:
        sample = adapt_judged(row, format, system="s")
    except BadRow:
        return
    judgement = sample.judgement
    assert judgement is not None
    assert (judgement.rejected, judgement.reward, judgement.step_labels) != (None, None, None)
    for conversation in (sample.conversation(), judgement.rejected or sample.conversation()):
        assert conversation[-1]["role"] == "assistant"
        assert conversation[-1]["content"].strip()
    if judgement.steps is not None:
        assert sample.response == judgement.separator.join(judgement.steps)


@settings(max_examples=200)
@given(row=ROWS)
def test_detection(row: dict) -> None:
    with contextlib.suppress(Refused):
        assert detect_format(row, "f") in ADAPTERS
    with contextlib.suppress(Refused):
        assert detect_judged(row, "f") in JUDGED
