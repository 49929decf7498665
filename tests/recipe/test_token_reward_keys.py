"""What must agree between granularity, spans, redistribution and the estimator."""

from typing import Any

import pytest
from pydantic import ValidationError

from rlhfctl.recipe.tasks import TASKS

RULE = {"kind": "verifier", "name": "chain_answer"}
MODEL = {"kind": "model", "path": "rm"}


def parse(
    sources: list[dict[str, Any]], task: str = "ppo", algorithm: dict[str, Any] | None = None, **reward: Any
):
    recipe = {
        "task": task,
        "name": "x",
        "policy": {"path": "p"},
        "data": {"train": [{"path": "d"}], "eval": [{"path": "d"}]},
        "reward": {"sources": sources, **reward},
        "train": {"steps": 1, "batch_size": 8},
    }
    if task == "ppo":
        recipe |= {"algorithm": algorithm or {}, "rollout": {"n": 2}}
    return TASKS[task].model_validate(recipe)


def test_what_fits_passes() -> None:
    parse([{**RULE, "span_weight": 0.2}], granularity="step")
    parse([{**MODEL, "span_weight": 1.0, "step_reward": "min"}, RULE], granularity="step")
    parse([MODEL], shaping={"redistribution": "difference", "preserve_total": False})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sources": [RULE], "granularity": "step"}, "needs a source with span_weight"),
        ({"sources": [{**RULE, "span_weight": 1.0}]}, "sources.0.span_weight is ignored here"),
        (
            {
                "sources": [{**RULE, "span_weight": 1.0}],
                "granularity": "step",
                "algorithm": {"advantage": "grpo"},
            },
            "reward.granularity needs an advantage per token",
        ),
        (
            {
                "sources": [MODEL],
                "shaping": {"redistribution": "difference"},
                "algorithm": {"advantage": "rloo"},
            },
            "reward.shaping.redistribution needs an advantage per token",
        ),
        (
            {
                "sources": [{**MODEL, "span_weight": 1.0}],
                "granularity": "token",
                "shaping": {"redistribution": "difference"},
            },
            "spreads one score of the response",
        ),
        ({"sources": [RULE], "shaping": {"redistribution": "difference"}}, "needs a source of kind model"),
        ({"sources": [{**MODEL, "step_reward": "raw"}]}, "sources.0.step_reward is ignored here"),
        ({"sources": [RULE], "shaping": {"preserve_total": False}}, "preserve_total is ignored here"),
        (
            {"sources": [RULE], "shaping": {"redistribution_share": 0.5}},
            "redistribution_share is ignored here",
        ),
        (
            {"task": "sft", "sources": [{**RULE, "span_weight": 1.0}], "granularity": "step"},
            "reward.granularity is ignored in an evaluation",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        parse(**keys)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": {"advantage": "prime"}}, "has no KL in its reward"),
        ({"algorithm": {"advantage": "prime", "kl_coef": 0.0}, "rollout": {"n": 1}}, "compares samples"),
        ({"implicit_prm": {}}, "uses no implicit_prm"),
    ],
)
def test_the_implicit_reward_model_belongs_to_prime(changes: dict[str, Any], said: str) -> None:
    recipe = {
        "task": "ppo",
        "name": "x",
        "policy": {"path": "p"},
        "data": {"train": [{"path": "d"}]},
        "reward": {"sources": [RULE]},
        "rollout": {"n": 2},
        "train": {"steps": 1, "batch_size": 8},
    }
    TASKS["ppo"].model_validate(
        {**recipe, "algorithm": {"advantage": "prime", "kl_coef": 0.1, "kl_in": "loss"}}
    )
    with pytest.raises(ValidationError, match=said):
        TASKS["ppo"].model_validate(recipe | changes)
