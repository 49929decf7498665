"""Sources that cannot give the spans that a recipe asks for are found before launch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.reward import check
from rlhfctl.recipe.tasks import TASKS

Found = list[tuple[str, str]]


@pytest.fixture
def found(chains: Path) -> Callable[..., Found]:
    """(id, title) of the errors of the reward check."""

    def run(sources: list[dict[str, Any]], **reward: Any) -> Found:
        model = str(chains / "model")
        recipe = TASKS["ppo"].model_validate(
            {
                "task": "ppo",
                "name": "x",
                "policy": {"from_config": model, "tokenizer": model},
                "data": {"train": [{"path": str(chains / "data/prompts.jsonl")}]},
                "reward": {"sources": sources, **reward},
                "train": {"steps": 1, "batch_size": 8},
            }
        )
        findings = check(Inputs(recipe, None, False))
        return [(finding.id, finding.title) for finding in findings if finding.severity == "error"]

    return run


def test_a_verifier_with_spans_and_one_without(found: Callable[..., Found]) -> None:
    right = {"kind": "verifier", "name": "chain_answer", "span_weight": 0.2}
    assert found([right], granularity="step") == []
    without = {"kind": "verifier", "name": "math_answer", "span_weight": 0.2}
    ((id, title),) = found([right, without], granularity="step")
    assert id == "R007"
    assert title.startswith("reward math_answer has a span_weight and gave no spans for any of")


def test_a_python_reward_without_spans(found: Callable[..., Found], tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def score(samples):\n    return [float(len(sample['response'])) for sample in samples]\n"
    )
    source = {"kind": "python", "path": str(tmp_path / "r.py"), "span_weight": 1.0}
    assert [id for id, _ in found([source], granularity="token")] == ["R007"]


@pytest.mark.parametrize(
    ("read", "reward", "ids"),
    [
        ("step_end", {"granularity": "step"}, []),
        ("step_end", {"granularity": "token"}, ["R007"]),
        ("token_sum", {"granularity": "token"}, []),
        ("token_sum", {"granularity": "step"}, ["R007"]),
        ("last_token", {"granularity": "step"}, ["R007"]),
        ("last_token", {"shaping": {"redistribution": "difference"}}, []),
        ("step_end", {"shaping": {"redistribution": "difference"}}, ["R008"]),
    ],
)
def test_reward_models_by_how_they_are_read(
    found: Callable[..., Found], tmp_path: Path, read: str, reward: dict[str, Any], ids: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"reward_model": {"read": read}, "model_type": "llama"}))
    source = {"kind": "model", "path": str(tmp_path)} | (
        {"span_weight": 1.0} if "granularity" in reward else {}
    )
    assert [id for id, _ in found([source], **reward)] == ids


def test_the_table_of_reads_has_those_of_the_models() -> None:
    from rlhfctl.models.reward_model import READS
    from rlhfctl.preflight.reward import GIVES

    assert set(READS) == {*GIVES, "last_token"}
