"""Models that read steps or tokens say through the service what each part of a response is worth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.rewards.model import ModelReward
from rlhfctl.rewards.spans import step_spans

ROWS = [
    {"id": "a", "messages": [{"role": "user", "content": "1+2*3?"}], "response": "1+2=3\n3*3=9\n#9"},
    {"id": "b", "messages": [{"role": "user", "content": "1+2?"}], "response": "\n1+2=4\n\n#4\n"},
    {"id": "c", "messages": [{"role": "user", "content": "1+2?"}], "response": "7"},
]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """make(read): a reward model that is random but for its seed, with a mean and a standard deviation."""

    def build(read: str) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        directory = tmp_path_factory.mktemp(read)
        write_model(directory)
        torch.manual_seed(5)
        config = AutoConfig.from_pretrained(directory, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
        settings = json.loads((directory / "config.json").read_text())
        settings |= {"normalize_reward": True, "mean": 0.25, "std": 2.0, "reward_model": {"read": read}}
        (directory / "config.json").write_text(json.dumps(settings))
        return directory

    return build


def test_steps(start: Callable[..., Any], make: Callable[[str], Path]) -> None:
    directory = make("step_end")
    service = start(directory)
    assert service.started["info"]["granularities"] == ["sequence", "step"]
    rewards = service.ask(*ROWS, granularity="step").json()["rewards"]
    texts = [
        [row["response"][s["start"] : s["end"]] for s in each["spans"]]
        for row, each in zip(ROWS, rewards, strict=True)
    ]
    assert texts == [["1+2=3", "3*3=9", "#9"], ["1+2=4", "#4"], ["7"]]
    for each in rewards:
        assert each["score"] == min(span["score"] for span in each["spans"])
    assert len({span["score"] for each in rewards for span in each["spans"]}) == 6
    here = ModelReward(ModelSource(kind="model", path=str(directory))).score(
        [{**row, "label": None} for row in ROWS]
    )
    assert [each["score"] for each in rewards] == pytest.approx([outcome.score for outcome in here], abs=1e-5)
    assert service.ask(*ROWS, granularity="token").status_code == 422


def test_tokens(start: Callable[..., Any], make: Callable[[str], Path]) -> None:
    service = start(make("token_sum"))
    assert service.started["info"]["granularities"] == ["sequence", "token"]
    rewards = service.ask(*ROWS, granularity="token").json()["rewards"]
    for row, each in zip(ROWS, rewards, strict=True):
        spans = each["spans"]
        # The tokenizer of the task has one token a character, so the spans are the characters.
        assert [(s["start"], s["end"]) for s in spans] == [(n, n + 1) for n in range(len(row["response"]))]
        assert each["score"] == pytest.approx(sum(span["score"] for span in spans), abs=1e-5)
    assert service.ask(*ROWS, granularity="step").status_code == 422


def test_empty_steps_are_none() -> None:
    spans = step_spans("a\n \nbc\n", "\n", [1.0, 2.0])
    assert [(span.start, span.end, span.score) for span in spans] == [(0, 1, 1.0), (4, 6, 2.0)]
    assert [(span.start, span.end) for span in step_spans("", "\n", [1.0])] == [(0, 0)]
