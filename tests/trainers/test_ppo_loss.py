"""The keys of `algorithm` in the loss of a pack: each moves it by the number of its formula, and its metric says so."""

import math

import pytest
import torch

from rlhfctl.models.packing import pack
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.trainers.experience import Experience
from rlhfctl.trainers.ppo_experience import make_experience
from rlhfctl.trainers.ppo_loss import Pass, Sums, policy_terms, train_pack
from rlhfctl.trainers.ppo_models import load_models
from rlhfctl.trainers.ppo_update import update_metrics
from rlhfctl.trainers.trajectory import Trajectory

FIRST = Pass(first=True, warming=False)


def response(tokens):
    return Trajectory(0, "row", [3, 4], tokens, torch.full((len(tokens),), -2.0), False, "", 1.0, 1.0)


@pytest.mark.parametrize(
    ("keys", "expected", "metrics"),
    [
        # Ratios 1.5, 6, .5, .5 with advantages 1, -2, 1, -1: min(1.5, 1.2) - 12 + .5 - max(.5, .8) = -11.1.
        ({}, 11.1 / 4, {"clip/fraction": 0.5}),
        ({"clip_epsilon_high": 0.4}, 10.9 / 4, {"clip/fraction": 0.5}),
        ({"clip_epsilon": 0.4, "clip_epsilon_high": 0.25}, 10.85 / 4, {"clip/fraction": 0.5}),
        ({"clip_epsilon": 0.6}, 10.5 / 4, {"clip/fraction": 0.0}),
        ({"dual_clip": 3.0}, 5.1 / 4, {"clip/dual_fraction": 0.25}),
        # d = 1 at every token; the coefficient of the step is .1, whatever the recipe's is.
        ({"kl_in": "loss", "kl_coef": 0.7}, 11.1 / 4 + 0.1 / math.e, {"loss/kl": 0.1 / math.e}),
        ({"kl_in": "loss", "kl_estimator": "k1"}, 11.1 / 4 + 0.1, {"loss/kl": 0.1}),
        ({"kl_in": "loss", "kl_estimator": "k2"}, 11.1 / 4 + 0.05, {"loss/kl": 0.05}),
        ({"kl_in": "reward"}, 11.1 / 4, {}),
        ({"entropy_coef": 0.01}, 11.1 / 4 - 0.025, {"loss/entropy": -0.025}),
    ],
)
def test_keys_of_the_policy_loss(keys, expected, metrics):
    algorithm = Algorithm(advantage="reinforce", **keys)
    new = torch.tensor([-1.0, -2.0, -3.0, -1.5])
    old = (new - torch.tensor([1.5, 6.0, 0.5, 0.5]).log())[None]
    experience = Experience(
        trajectories=[response([5, 6, 7, 8])],
        mask=torch.ones(1, 4, dtype=torch.bool),
        rollout_logprobs=old,
        old_logprobs=old,
        ref_logprobs=(new - 1.0)[None],
        values=None,
        advantages=torch.tensor([[1.0, -2.0, 1.0, -1.0]]),
        returns=None,
        zero_variance_groups=0,
        kl_coef=0.1,
    )
    packed = pack([0], experience.ids, experience.trained)
    entropy, weights, sums = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4,), 0.25), Sums()
    loss = policy_terms(algorithm, experience, packed, new, entropy, weights, sums, first=True)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    found = update_metrics(algorithm, sums.values, {"policy": [1.0]})
    assert {name: found[name] for name in metrics} == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize(
    ("clip", "expected", "clipped"),
    [
        # V is .5 above what it was and 1 below the return: the clipped value is 1.3 below it.
        ("0.2", 0.5 * 1.69, 1.0),
        ("0.6", 0.5, 0.0),
        ("null", 0.5, 0.0),
    ],
)
def test_keys_of_the_value_loss(context, clip, expected, clipped):
    def trained(coef):
        shared = ("algorithm.advantage=gae", "value_model.shared_trunk=true", "value_model.head=normal")
        ctx = context("value", *shared, f"algorithm.value_clip={clip}", f"algorithm.value_coef={coef}")
        models, encoder = load_models(ctx, ctx.recipe), policy_encoder(ctx.recipe.policy, ctx.say)
        rows = [response([5, 6, 7])]
        rows[0].text = encoder.decode_response(rows[0].response_ids)
        experience = make_experience(ctx, ctx.recipe, models, rows)
        packed = pack([0], experience.ids, experience.trained)
        now = models.values(packed).detach()
        experience.values, experience.returns = (now - 0.5)[None], (now + 1.0)[None]
        experience.advantages = torch.zeros(1, 3)
        sums = Sums()
        train_pack(ctx.recipe.algorithm, models, experience, packed, torch.full((3,), 1 / 3), sums, FIRST)
        metrics = update_metrics(ctx.recipe.algorithm, sums.values, {"policy": [1.0]})
        return metrics, models.critic.head.weight.grad

    (metrics, once), (_, five) = trained(1.0), trained(5.0)
    assert metrics["loss/value"] == pytest.approx(expected, rel=1e-5)
    assert metrics["value/clip_fraction"] == clipped
    torch.testing.assert_close(five, 5 * once)
    assert bool(once.any()) == (not clipped)  # a clipped value has no gradient
