import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.recipe.sections import Reward
from rlhfctl.rewards.build import build_sources
from rlhfctl.rewards.outcome import Outcome, Span
from rlhfctl.rewards.score import score_samples


class Fixed:
    """A source that gives the outcomes it was made with."""

    def __init__(self, name: str, weight: float, outcomes: list[Outcome]) -> None:
        self.name, self.weight, self.outcomes = name, weight, outcomes
        self.span_weight = 0.0

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        return self.outcomes

    def close(self) -> None:
        pass


SAMPLES = [
    {"id": str(i), "messages": [], "response": "r", "label": None, "metadata": {"row": i}} for i in range(3)
]


def test_weighted_sum_by_hand() -> None:
    a = Fixed("a", 1.0, [Outcome("ok", 1.0), Outcome("ok", 0.5), Outcome("ok", -2.0)])
    b = Fixed("b", -0.1, [Outcome("ok", 10.0), Outcome("ok", 0.0), Outcome("ok", 5.0)])
    scored = score_samples([a, b], SAMPLES)
    assert scored.totals == [0.0, 0.5, -2.5]
    assert scored.metrics == {"reward/a": pytest.approx(-0.5 / 3), "reward/b": 5.0, "reward/failures": 0.0}
    assert scored.failures == []


def test_a_failure_is_no_number() -> None:
    a = Fixed("a", 1.0, [Outcome("ok", 1.0, metrics={"correct": 1.0})] * 3)
    late = Outcome("timeout", error="no answer after 60 s")
    b = Fixed(
        "b", 0.0, [Outcome("ok", 0.0, metrics={"long": 4.0}), late, Outcome("missing", error="no label")]
    )
    scored = score_samples([a, b], SAMPLES)
    assert scored.totals == [1.0, None, None]
    assert scored.outcomes["b"][1] is late
    assert scored.metrics == {
        "correct": 1.0,
        "long": 4.0,
        "reward/a": 1.0,
        "reward/b": 0.0,
        "reward/failures": 2.0,
    }
    assert scored.failures == [
        {
            "id": "1",
            "source": "b",
            "status": "timeout",
            "error": "no answer after 60 s",
            "sample": SAMPLES[1],
        },
        {"id": "2", "source": "b", "status": "missing", "error": "no label", "sample": SAMPLES[2]},
    ]


def test_quarantine_is_json_whatever_a_table_held() -> None:
    sample = {**SAMPLES[0], "metadata": {"day": date(2025, 1, 15)}}
    (record,) = score_samples([Fixed("a", 1.0, [Outcome("error", error="e")])], [sample]).failures
    assert json.loads(json.dumps(record))["sample"]["metadata"] == {"day": "2025-01-15"}


def test_sources_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def score(samples):\n    return [len(s['response']) for s in samples]\n")
    reward = Reward.model_validate(
        {
            "sources": [
                {"kind": "verifier", "name": "math_answer", "right": 2.0, "weight": 0.5},
                {"kind": "verifier", "name": "math_answer", "wrong": -1.0},
                {"kind": "python", "path": str(tmp_path / "r.py"), "weight": 10.0},
            ]
        }
    )
    sources = build_sources(reward)
    try:
        samples = [
            {"id": "a", "messages": [], "response": "#### 7", "label": "7", "metadata": {}},
            {"id": "b", "messages": [], "response": "#### 8", "label": "7", "metadata": {}},
        ]
        scored = score_samples(sources, samples)
        assert [source.name for source in sources] == ["math_answer", "math_answer#2", "r.score"]
        assert scored.totals == [0.5 * 2 + 1 + 60, 0 - 1 + 60]
        assert scored.metrics["correct"] == 0.5
        assert scored.metrics["reward/math_answer#2"] == 0.0
    finally:
        for source in sources:
            source.close()


def test_a_source_whose_spans_count_and_that_gives_none_has_no_score() -> None:
    spans = [Span(0, 1, 1.0)]
    source = Fixed("a", 1.0, [Outcome("ok", 1.0, spans), Outcome("ok", 1.0), Outcome("ok", 1.0)])
    source.span_weight = 0.5
    scored = score_samples([source], [SAMPLES[0], SAMPLES[1], {**SAMPLES[2], "response": " "}])
    assert scored.totals == [1.0, None, 1.0]  # nothing was written in the third: there is nothing to judge
    assert scored.failures[0]["status"] == "missing"
