"""The shipped python reward, called the way a run calls it."""

from pathlib import Path

import pytest

from rlhfctl.data.load import load_samples
from rlhfctl.recipe.sections import DataSource, PythonSource
from rlhfctl.rewards.python_source import PythonReward


def test_happy_words(repo: Path) -> None:
    source = PythonReward(PythonSource(kind="python", path=str(repo / "recipes/stories/reward.py")))
    texts = [
        "",
        "The cat sat.",
        "Happy, happy, happy cat!",
        "They laughed and hugged. Fun!",
        "A kind, glad, proud, happy friend smiled",
    ]
    try:
        outcomes = source.score(
            [{"id": "", "messages": [], "response": text, "label": None, "metadata": {}} for text in texts]
        )
    finally:
        source.close()
    assert [outcome.score for outcome in outcomes] == [0.0, 0.0, 0.25, 0.75, 1.0]
    assert outcomes[2].metrics == {"happy_words": 1.0, "words": 4.0, "different_words": 0.5}
    assert outcomes[4].metrics["happy_words"] == 6.0
    assert outcomes[0].metrics["different_words"] == pytest.approx(0.0)


def test_prompts_are_128_different_ones(repo: Path) -> None:
    loaded = load_samples([DataSource(path=str(repo / "recipes/stories/prompts.jsonl"))])
    assert loaded.reports[0].format == "prompt_response"
    assert len({sample.messages[0]["content"] for sample in loaded.samples}) == 128
