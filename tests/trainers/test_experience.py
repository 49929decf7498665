"""Advantages of a batch by hand: which score, penalty and mask reach which token."""

import math

import pytest
import torch

from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.trainers.experience import build
from rlhfctl.trainers.ppo_metrics import batch_metrics
from rlhfctl.trainers.trajectory import Trajectory


def trajectory(index, tokens, shaped):
    return Trajectory(
        index=index,
        sample_id=f"row{index}",
        prompt_ids=[1, 2],
        response_ids=list(range(tokens)),
        logprobs=torch.full((tokens,), -1.0),
        truncated=False,
        text="",
        reward=shaped,
        shaped=shaped,
    )


def test_gae_with_the_penalty_in_the_reward():
    """One response of two tokens: kl 0.5 and 0.25 (k1), coefficient 0.1, score 1, values 0.2 and 0.4, lambda 0.5.

    rewards -0.05, 1 - 0.025; delta_1 = 0.975 - 0.4 = 0.575; delta_0 = -0.05 + 0.4 - 0.2 = 0.15;
    A_1 = 0.575, A_0 = 0.15 + 0.5 * 0.575 = 0.4375; returns A + V.
    """
    algorithm = Algorithm(kl_coef=0.1, gae_lambda=0.5, whiten_advantages=False)
    old = torch.tensor([[-1.0, -1.0]])
    experience = build(
        [trajectory(0, 2, 1.0)],
        old,
        old - torch.tensor([[0.5, 0.25]]),
        torch.tensor([[0.2, 0.4]]),
        algorithm,
        1,
    )
    torch.testing.assert_close(experience.advantages, torch.tensor([[0.4375, 0.575]]))
    torch.testing.assert_close(experience.returns, torch.tensor([[0.6375, 0.975]]))
    metrics = batch_metrics(experience)
    assert metrics["kl/reference"] == pytest.approx(0.375)
    assert metrics["kl/reference_sequence"] == pytest.approx(0.75)


def test_penalty_in_the_loss_leaves_the_reward_alone():
    algorithm = Algorithm(kl_coef=0.1, kl_in="loss", gae_lambda=1.0, whiten_advantages=False)
    old = torch.tensor([[-1.0, -1.0]])
    experience = build([trajectory(0, 2, 1.0)], old, old - 0.5, torch.zeros(1, 2), algorithm, 1)
    torch.testing.assert_close(experience.advantages, torch.tensor([[1.0, 1.0]]))


def test_a_group_is_compared_without_the_sample_whose_reward_failed():
    """Scores 1, (failed), 3 of the first prompt and 2, 2, 2 of the second, rloo: 1 - 3, 3 - 1, and no signal."""
    algorithm = Algorithm(advantage="rloo", kl_coef=0.0)
    kept = [
        trajectory(index, tokens, score)
        for index, tokens, score in [(0, 1, 1.0), (2, 3, 3.0), (3, 2, 2.0), (4, 2, 2.0), (5, 1, 2.0)]
    ]
    old = torch.zeros(5, 3)
    experience = build(kept, old, None, None, algorithm, 3)
    expected = [[-2.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0] * 3, [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(experience.advantages, torch.tensor(expected))
    assert (experience.groups, experience.zero_variance_groups) == (2, 1)
    assert batch_metrics(experience)["groups/zero_variance_fraction"] == 0.5


def test_group_scores_carry_the_penalty_of_the_whole_response():
    """Scores 1 and 1, penalties 0.1 * (0.2 + 0.2) and 0: totals 0.96 and 1; dr_grpo subtracts their mean."""
    algorithm = Algorithm(advantage="dr_grpo", kl_coef=0.1)
    old = torch.tensor([[-1.0, -1.0], [-1.0, 0.0]])
    reference = torch.tensor([[-1.2, -1.2], [-1.0, 0.0]])
    experience = build([trajectory(0, 2, 1.0), trajectory(1, 1, 1.0)], old, reference, None, algorithm, 2)
    torch.testing.assert_close(experience.advantages, torch.tensor([[-0.02, -0.02], [0.02, 0.0]]))
    assert experience.zero_variance_groups == 1  # counted on what was earned, not on the penalty


def test_default_whitening_by_estimator():
    rows = [trajectory(0, 2, 1.0), trajectory(1, 2, 0.0)]
    old = torch.zeros(2, 2)

    def spread(**keys):
        algorithm = Algorithm(kl_coef=0.0, **keys)
        values = torch.zeros(2, 2) if algorithm.advantage == "gae" else None
        advantages = build(rows, old, None, values, algorithm, 2).advantages
        return float(advantages.pow(2).mean())

    assert spread(advantage="gae") == pytest.approx(1.0, abs=1e-6)
    assert spread(advantage="reinforce") == pytest.approx(1.0, abs=1e-6)
    assert spread(advantage="reinforce_baseline") == pytest.approx(1.0, abs=1e-6)
    assert spread(advantage="dr_grpo") == pytest.approx(0.25, abs=1e-6)
    assert spread(advantage="grpo") == pytest.approx((0.5 / (math.sqrt(0.5) + 1e-4)) ** 2, abs=1e-6)
    # lambda 0.95, no values: 0.95 and 1 for the rewarded response, 0 and 0 for the other.
    assert spread(advantage="gae", whiten_advantages=False) == pytest.approx((0.95**2 + 1) / 4, abs=1e-6)
