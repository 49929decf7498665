from typing import Any

import pytest

from rlhfctl.data.detect import detect_format
from rlhfctl.errors import Refused

TURNS = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": TURNS}, "messages"),
        ({"messages": TURNS, "label": "yes"}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"instruction": "i", "output": "o"}, "alpaca"),
        ({"prompt": "p", "completion": "c", "extra": 1}, "prompt_response"),
        ({"prompt": TURNS, "response": "c"}, "prompt_response"),
        ({"prompt": "p"}, "prompt_response"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "hh_transcript"),
        ({"text": "Human: a\n\nAssistant: b"}, "hh_transcript"),
        ({"question": "q", "answer": 3}, "qa"),
        ({"input": "q", "target": 3, "steps": []}, "qa"),
        ({"problem": "q", "solution": "s"}, "qa"),
    ],
)
def test_detected(row: dict[str, Any], format: str) -> None:
    assert detect_format(row, "f") == format


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, r"preference pairs.*columns: \{chosen: response\}"),
        ({"prompt": "p", "response": "a", "reward": 1.0}, "scored trajectories.*format: prompt_response"),
        ({"prompt": "p", "completions": ["a"], "labels": [True]}, "step-labelled rows"),
        ({"messages": TURNS, "label": False}, "marked good or bad.*format: messages"),
        ({"prompt": "p", "answer": "a"}, "no format fits the columns prompt, answer"),
        ({"a": 1}, "no format fits the columns a; set data.*format to one of messages, sharegpt"),
    ],
)
def test_refused_with_the_way_out(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        detect_format(row, "f")
