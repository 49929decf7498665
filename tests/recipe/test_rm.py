"""The schema of rm: what belongs together, and what would change nothing."""

from typing import Any

import pytest
from pydantic import ValidationError

from rlhfctl.recipe.load import dump, load_recipe
from rlhfctl.recipe.tasks import RmRecipe

BASE = {
    "task": "rm",
    "name": "x",
    "policy": {"path": "p"},
    "data": {"train": [{"path": "f"}]},
    "train": {"steps": 1},
}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"algorithm": {"objective": "step", "step_coef": 1.0}}, "algorithm.step_coef is ignored here"),
        (
            {"algorithm": {"objective": "outcome", "center_coef": 0.1}},
            "algorithm.center_coef is ignored here",
        ),
        ({"algorithm": {"objective": "step", "margin_coef": 0.5}}, "algorithm.margin_coef is ignored here"),
        ({"algorithm": {"outcome_threshold": 0.1}}, "algorithm.outcome_threshold is ignored here"),
        ({"train": {"steps": 1, "samples_every": 5}}, "train.samples_every is ignored here"),
        (
            {
                "algorithm": {"objective": "step"},
                "data": {"train": [{"path": "f", "format": "stepwise", "step_separator": ""}]},
            },
            "data step_separator is empty",
        ),
        ({"data": {"train": [{"path": "f"}], "train_on": "last_assistant"}}, "data.train_on is ignored here"),
        (
            {"data": {"train": [{"path": "f", "format": "preference", "step_separator": " "}]}},
            "step_separator is ignored",
        ),
        ({"policy": {"from_config": "c", "tokenizer": "c", "lora": {}}}, "policy.lora needs policy.path"),
        ({"reward": {"sources": []}}, "Extra inputs are not permitted"),
        ({"rollout": {"n": 4}}, "Extra inputs are not permitted"),
    ],
)
def test_ignored_keys_are_errors(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RmRecipe.model_validate(BASE | keys)


def test_how_the_head_is_read() -> None:
    def read(**keys: Any) -> str:
        return RmRecipe.model_validate(BASE | {"algorithm": keys}).algorithm.read

    assert read() == read(objective="outcome") == read(step_coef=1.0) == "last_token"
    assert read(objective="step") == "step_end"
    assert read(score="token_sum") == read(objective="step", score="token_sum") == "token_sum"


def test_the_shipped_recipe_and_its_resolved_form(tmp_path: Any) -> None:
    loaded = load_recipe("quickstart/rm")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump(loaded.recipe))
    assert load_recipe(str(resolved)).recipe == loaded.recipe
    assert loaded.recipe.reward is None
