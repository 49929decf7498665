"""Weights that are no numbers are never saved: the last update of a run is seen by no loss."""

import copy
import math

import pytest
import torch
from torch import nn

from rlhfctl.errors import RunFailed
from rlhfctl.models.export import merged_copy
from rlhfctl.models.finite import all_finite, first_non_finite
from rlhfctl.models.load import load_causal_lm
from rlhfctl.models.lora import add_lora
from rlhfctl.recipe.sections import Lora
from rlhfctl.trainers import checkpoint, ppo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_parameter_that_is_no_number_is_named(dtype, bad):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2)).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(3e38)  # huge, and a number: a sum of it would not be one
    assert first_non_finite(model.named_parameters()) is None
    with torch.no_grad():
        model[1].weight[1, 7] = bad
        model[1].bias[0] = bad
    assert first_non_finite(model.named_parameters()) == "1.weight"
    assert all_finite([torch.empty(0, dtype=dtype), model[0].weight])
    assert not all_finite([model[0].weight, model[1].bias])


def test_an_update_that_overflows_ends_the_run_without_a_model(context):
    ctx = context("run", "train.steps=1", "optim.lr=1e300")
    with pytest.raises(RunFailed) as failed:
        ppo.train(ctx)
    assert failed.value.exit_code == 1
    assert failed.value.message.startswith(
        "model.embed_tokens.weight of policy holds NaN or infinity after step 1: "
    )
    assert "there is no earlier checkpoint" in failed.value.message
    assert not ctx.run.final.exists()
    assert ctx.run.newest_checkpoint() is None


def test_earlier_checkpoints_are_kept_and_named(context):
    ctx = context("run")
    policy = load_causal_lm(ctx.recipe.policy, ctx.device, 0)
    name, parameter = list(policy.named_parameters())[-1]
    checkpoint.save(ctx, {"policy": policy}, {}, {"step": 1})
    with torch.no_grad():
        parameter.view(-1)[-1] = math.nan
    with pytest.raises(RunFailed, match=f"{name} of policy .* after step 2: .* step_000001 is kept"):
        checkpoint.save(ctx, {"policy": policy}, {}, {"step": 2})
    assert [path.name for path in ctx.run.checkpoints.iterdir()] == ["step_000001"]
    parameter.requires_grad_(False)  # what is not trained is what the run was given
    checkpoint.save(ctx, {"policy": policy}, {}, {"step": 2})
    assert ctx.run.newest_checkpoint().name == "step_000002"


def test_an_adapter_that_overflows_when_it_is_merged_is_not_exported(context):
    """Its own matrices are numbers, their product is none."""
    policy = load_causal_lm(context("run").recipe.policy, torch.device("cpu"), 0)
    add_lora(policy, Lora(rank=2), 0)
    before = copy.deepcopy(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:
                parameter.fill_(1e30)
    assert first_non_finite(policy.named_parameters()) is None
    with pytest.raises(RunFailed, match="overflows when it is added to its weight"):
        merged_copy(policy)
    assert first_non_finite(merged_copy(before).named_parameters()) is None
