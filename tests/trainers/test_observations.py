"""Responses with observations inside (another turn's text): context for the policy, and no more than that."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.models import attention
from rlhfctl.models.load import prepare
from rlhfctl.models.packing import pack
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.rollout.segments import Segment, join
from rlhfctl.trainers.experience import build, score_tokens
from rlhfctl.trainers.ppo_loss import Pass, Sums, train_pack
from rlhfctl.trainers.ppo_metrics import batch_metrics
from rlhfctl.trainers.ppo_models import PpoModels
from rlhfctl.trainers.trajectory import Trajectory

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
# The policy wrote two tokens, was shown two, and wrote two more.
TURNS = [
    Segment([3, 4], torch.tensor([-1.0, -2.0])),
    Segment([9, 8]),
    Segment([5, 6], torch.tensor([-0.5, -0.25])),
]


def two_turns(index=0, shaped=1.0, observed=(9, 8)):
    segments = [TURNS[0], Segment(list(observed)), TURNS[2]]
    ids, logprobs, mask = join(segments)
    return Trajectory(
        index,
        f"row{index}",
        [1, 2],
        ids,
        logprobs,
        False,
        "",
        shaped,
        shaped,
        observed=[not mine for mine in mask],
    )


def one_turn(index, tokens, shaped):
    logprobs = torch.full((tokens,), -1.0)
    return Trajectory(
        index, f"row{index}", [1], list(range(3, 3 + tokens)), logprobs, False, "", shaped, shaped
    )


def test_segments_become_one_response():
    ids, logprobs, mask = join(TURNS)
    assert ids == [3, 4, 9, 8, 5, 6]
    assert logprobs.tolist() == [-1.0, -2.0, 0.0, 0.0, -0.5, -0.25]
    assert mask == [True, True, False, False, True, True]
    with pytest.raises(ValueError, match="1 log-probabilities for 2 tokens"):
        join([Segment([1, 2], torch.zeros(1))])
    with pytest.raises(ValueError, match="without a token of the policy"):
        join([Segment([1, 2])])


def test_gae_through_the_experience_gives_the_numbers_of_the_formula():
    """V = .5, .4 | .3, .2 and reward 1: .4006 .5270 in the first turn, where zeroing in place gives .3148 .4366."""
    algorithm = Algorithm(kl_coef=0.0, gae_lambda=0.95, whiten_advantages=False)
    values = torch.tensor([[0.5, 0.4, 7.0, -7.0, 0.3, 0.2]])
    experience = build([two_turns()], torch.zeros(1, 6), None, values, algorithm, 1)
    expected = torch.tensor([[0.40065, 0.527, 0.0, 0.0, 0.66, 0.8]])
    torch.testing.assert_close(experience.advantages, expected)
    torch.testing.assert_close(experience.returns, expected + experience.mask * values)
    assert experience.rewards.tolist() == [[0, 0, 0, 0, 0, 1]]


def test_the_penalty_and_its_metrics_see_no_observation():
    """k1 = .2 on each token of the policy and 50 on the observations: .2 a token, .8 a response."""
    algorithm = Algorithm(kl_coef=0.1, gae_lambda=1.0, whiten_advantages=False)
    old = torch.tensor([[-1.0, -2.0, 0.0, 0.0, -0.5, -0.25]])
    reference = old - torch.tensor([[0.2, 0.2, 50.0, -50.0, 0.2, 0.2]])
    experience = build([two_turns()], old, reference, torch.zeros(1, 6), algorithm, 1)
    torch.testing.assert_close(experience.rewards, torch.tensor([[-0.02, -0.02, 0, 0, -0.02, 0.98]]))
    metrics = batch_metrics(experience)
    assert metrics["kl/reference"] == pytest.approx(0.2)
    assert metrics["kl/reference_sequence"] == pytest.approx(0.8)
    assert metrics["length/response"] == 4


def test_token_rewards_of_an_observation_are_refused():
    trajectory = two_turns()
    trajectory.token_rewards = torch.tensor([0, 0, 1.0, 0, 0, 0])
    with pytest.raises(ValueError, match="stand outside the response mask"):
        build([trajectory], torch.zeros(1, 6), None, torch.zeros(1, 6), Algorithm(kl_coef=0.0), 1)


@pytest.fixture
def model():
    attention.register()
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation=attention.NAME)
    return prepare(made, CPU)


def recipe():
    return PpoRecipe.model_validate(
        {
            "task": "ppo",
            "name": "x",
            "policy": {"path": "none"},
            "data": {"train": [{"path": "none"}]},
            "reward": {"sources": [{"kind": "verifier", "name": "chain_answer"}]},
            "algorithm": {
                "advantage": "reinforce",
                "kl_coef": 0.1,
                "kl_in": "loss",
                "whiten_advantages": False,
            },
            "train": {"steps": 1, "batch_size": 2},
        }
    )


def gradients(model, experience, weights):
    """Of one packed forward over both responses, and the sums of its metrics."""
    model.zero_grad()
    batch = pack([0, 1], experience.ids, experience.trained)
    sums = Sums()
    models, stage = PpoModels(model, None, None, 1.0), Pass(first=True, warming=False)
    train_pack(recipe().algorithm, models, experience, batch, weights, sums, stage)
    return [parameter.grad.clone() for parameter in model.parameters()], sums.values


def test_loss_and_kl_read_the_policys_tokens_and_nothing_else(model):
    rows = [two_turns(0, 1.0), one_turn(1, 3, -1.0)]
    models = PpoModels(model, None, None, 1.0)
    old = score_tokens(rows, models.logprobs, 0, 1, 64, CPU)
    assert old.shape == (2, 6)
    assert old[0, 2:4].tolist() == [0, 0]
    assert (old[0, [0, 1, 4, 5]] < 0).all()
    assert (old[1, 3:] == 0).all()
    experience = build(rows, old, old - 0.3, None, recipe().algorithm, 1)
    weights = torch.full((7,), 1 / 7)  # 4 + 3 tokens of the policy
    found, sums = gradients(model, experience, weights)
    assert sums["tokens"] == 7

    # Whatever stands at observations changes nothing.
    poisoned = dataclasses.replace(experience)
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages"):
        rubbish = getattr(experience, name).clone()
        rubbish[0, 2:4] = 1e3
        setattr(poisoned, name, rubbish)
    same, same_sums = gradients(model, poisoned, weights)
    assert same_sums == sums
    assert all(torch.equal(a, b) for a, b in zip(same, found, strict=True))

    # The observation is context: another one changes the log-probabilities after it, and only those.
    other = score_tokens([two_turns(0, 1.0, (7, 7)), rows[1]], models.logprobs, 0, 1, 64, CPU)
    torch.testing.assert_close(other[0, :2], old[0, :2])
    assert not torch.allclose(other[0, 4:], old[0, 4:])


def test_old_logprobs_of_the_first_pass_go_to_their_places(model):
    rows = [two_turns(0, 1.0), one_turn(1, 3, -1.0)]
    known = score_tokens(rows, PpoModels(model, None, None, 1.0).logprobs, 0, 1, 64, CPU)
    experience = build(rows, torch.zeros(2, 6), known, None, recipe().algorithm, 1)
    experience.old_known = False
    gradients(model, experience, torch.full((7,), 1 / 7))
    torch.testing.assert_close(experience.old_logprobs, known, atol=1e-5, rtol=0)
