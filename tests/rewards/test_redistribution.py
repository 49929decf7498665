"""A reward model read at every token: what its spans sum to, and that its score is the one it had."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.errors import Refused
from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.sections import ModelSource, Reward
from rlhfctl.rewards.build import build_sources
from rlhfctl.rewards.model import ModelReward

MEAN, STD = 0.25, 2.0
TEXTS = ["1+2=3\n3*3=9\n#9", "\n1+2=4\n\n#4\n", "7", ""]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that is random but for its seed, with a mean and a standard deviation."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    directory = tmp_path_factory.mktemp("rm")
    write_model(directory)
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(directory, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"normalize_reward": True, "mean": MEAN, "std": STD}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def rows(texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": "1+2*3?"}]
    return [{"id": str(i), "messages": messages, "response": t, "label": None} for i, t in enumerate(texts)]


def test_spans_are_what_each_token_adds(path: Path) -> None:
    section = ModelSource(kind="model", path=str(path))
    plain = ModelReward(section).score(rows())
    spread = ModelReward(section, redistribution="difference")
    outcomes = spread.score(rows())
    assert [outcome.score for outcome in outcomes] == pytest.approx([o.score for o in plain], abs=1e-5)
    assert all(not outcome.spans for outcome in plain)
    assert outcomes[3].spans == []  # nothing was written: its score stays whole
    before = read_alone(spread, "")
    for text, outcome in zip(TEXTS[:3], outcomes, strict=False):
        pieces = [text[span.start : span.end] for span in outcome.spans]
        assert "".join(pieces) == text
        # RM(x, y_<=t) by a forward pass of its own for each beginning; the end of the turn goes to the last one.
        values = [before, *(read_alone(spread, text[: span.end]) for span in outcome.spans[:-1])]
        expected = [b - a for a, b in pairwise(values)]
        assert [span.score for span in outcome.spans[:-1]] == pytest.approx(expected, abs=1e-5)
        assert outcome.score is not None
        assert sum(span.score for span in outcome.spans) == pytest.approx(outcome.score - before, abs=1e-5)


def test_attention_spans_are_those_of_eager_attention_and_sum_to_the_score(path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    section = ModelSource(kind="model", path=str(path))
    plain = ModelReward(section).score(rows())
    source = ModelReward(section, redistribution="attention")
    outcomes = source.score(rows())
    assert [outcome.score for outcome in outcomes] == pytest.approx([o.score for o in plain], abs=1e-5)
    eager = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    for text, row, outcome in zip(TEXTS[:3], rows(), outcomes, strict=False):
        assert outcome.score is not None
        assert "".join(text[span.start : span.end] for span in outcome.spans) == text
        assert sum(span.score for span in outcome.spans) == pytest.approx(outcome.score, abs=1e-5)
        bridged = source.bridge.encode(row["messages"], text)
        places = source.places(bridged, text)
        with torch.no_grad():
            heads = eager(torch.tensor([bridged.ids]), output_attentions=True).attentions[-1][0]
        alpha = heads[:, places[-1], places].mean(0)
        expected = (outcome.score * alpha / alpha.sum()).tolist()
        found = [span.score for span in outcome.spans]
        assert found[:-1] == pytest.approx(expected[: len(found) - 1], abs=1e-5)
        assert found[-1] == pytest.approx(
            sum(expected[len(found) - 1 :]), abs=1e-5
        )  # the end of the turn with it
    assert outcomes[3].score is not None


def read_alone(source: ModelReward, beginning: str) -> float:
    """The normalised score of the prompt and a beginning of the response, which stops in mid-turn."""
    ids = source.bridge.rm.encode_text("1+2*3?" + beginning)
    (values,) = source.model.at([ids], [[len(ids) - 1]], 512)
    return (values[0] - MEAN) / STD


def test_a_model_that_cannot_give_the_spans_is_refused(path: Path) -> None:
    reward = {"sources": [{"kind": "model", "path": str(path), "span_weight": 1.0}], "granularity": "step"}
    with pytest.raises(Refused, match=r"gives one score a response, its source has a span_weight"):
        build_sources(Reward.model_validate(reward))
