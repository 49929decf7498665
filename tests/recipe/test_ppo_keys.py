"""What must agree between the options of ppo."""

from typing import Any

import pytest
from pydantic import ValidationError

from rlhfctl.recipe.tasks import PpoRecipe


def parse(algorithm: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, **train: Any):
    return PpoRecipe.model_validate(
        {
            "task": "ppo",
            "name": "x",
            "policy": {"path": "p"},
            "data": {"train": [{"path": "d"}]},
            "reward": {"sources": [{"kind": "verifier", "name": "chain_answer"}]},
            "algorithm": algorithm or {},
            "rollout": {"n": 2, **(rollout or {})},
            "train": {"batch_size": 8, **(train or {"steps": 5})},
        }
    )


def test_what_fits_passes() -> None:
    parse({"advantage": "grpo", "loss": "gspo", "loss_mean": "sequence"})
    parse({"advantage": "rloo"}, {"dynamic_sampling": True, "max_refills": 9})
    parse({}, {"top_p": 0.9})
    parse({"kl_target": 0.1, "kl_horizon": 500, "value_warmup_steps": 4, "entropy_coef": 0.01})
    assert parse({"importance_correction": "icepop"}).algorithm.bounds == (0.5, 5.0)
    assert parse({"importance_correction": "sequence_mask"}).algorithm.bounds == (0.9, 1.1)
    given = {
        "importance_correction": "sequence_mask",
        "importance_cap": 3.0,
        "importance_bounds": [0.99, 1.01],
    }
    assert parse(given).algorithm.bounds == (0.99, 1.01)


@pytest.mark.parametrize(
    ("algorithm", "rollout", "said"),
    [
        ({"loss": "gspo", "loss_mean": "sequence"}, {}, "gspo moves whole responses"),
        ({"advantage": "grpo", "loss": "gspo"}, {}, "set algorithm.loss_mean to sequence"),
        ({"importance_bounds": [0.5, 2.0]}, {}, "algorithm.importance_bounds is ignored here"),
        ({"importance_correction": "icepop", "importance_cap": 3.0}, {}, "importance_cap is ignored here"),
        (
            {"importance_correction": "icepop", "importance_bounds": [2.0, 0.5]},
            {},
            r"\[low, high\] with 0 <= low <= high",
        ),
        (
            {"importance_correction": "icepop", "old_logprobs": "sampler"},
            {},
            "old_logprobs cannot be sampler",
        ),
        (
            {"importance_correction": "tis"},
            {"top_p": 0.9},
            r"set rollout\.top_p to 1, or importance_correction to none",
        ),
        ({"kl_coef": 0.0, "kl_target": 0.1}, {}, "algorithm.kl_target is ignored here"),
        ({"kl_horizon": 500}, {}, "algorithm.kl_horizon is ignored here"),
        ({"advantage": "grpo", "value_warmup_steps": 2}, {}, "algorithm.value_warmup_steps is ignored here"),
        ({"value_warmup_steps": 5}, {}, r"value_warmup_steps \(5\) leaves none of train.steps \(5\)"),
        ({}, {"dynamic_sampling": True}, "rollout.dynamic_sampling is ignored here"),
        ({"advantage": "grpo"}, {"max_refills": 2}, "rollout.max_refills is ignored here"),
    ],
)
def test_what_does_not_is_told(algorithm: dict[str, Any], rollout: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        parse(algorithm, rollout)


def test_dynamic_sampling_counts_steps_not_epochs() -> None:
    with pytest.raises(ValidationError, match=r"give train\.steps, not train\.epochs"):
        parse({"advantage": "grpo"}, {"dynamic_sampling": True}, epochs=1)
