"""Spans of sources to token rewards of a trajectory, and those through the experience to advantages."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.recipe.sections import Reward, Shaping
from rlhfctl.rewards.outcome import Outcome, Span
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers.experience import build
from rlhfctl.trainers.ppo_metrics import batch_metrics
from rlhfctl.trainers.token_rewards import step_agreement, token_scores, unspread
from rlhfctl.trainers.token_table import token_table
from rlhfctl.trainers.trajectory import Trajectory

VERIFIER = {"kind": "verifier", "name": "chain_answer"}


@pytest.fixture(scope="module")
def encoder(chains):
    return ChatEncoder.from_path(chains / "model")


def answered(encoder, text, index=0, shaped=1.0):
    ids = [*encoder.encode_text(text), encoder.eos_id]
    logprobs = torch.full((len(ids),), -1.0)
    prompt = encoder.encode_text("1+2?")
    return Trajectory(index, f"r{index}", prompt, ids, logprobs, False, text, shaped, shaped)


def source(name="rule", **keys):
    return SimpleNamespace(**{"name": name, "weight": 1.0, "span_weight": 1.0, **keys})


def reward(**keys):
    return Reward.model_validate({"sources": [VERIFIER], **keys})


def test_steps_of_two_sources_on_the_tokens_that_end_them(encoder):
    """Weights .5 and 2; one token per character: "1+2=3" ends at token 4, "#3" at token 7; the stop token is 8."""
    trajectory = answered(encoder, "1+2=3\n#3")
    outcomes = {
        "rule": Outcome("ok", 1.0, [Span(0, 5, 1.0), Span(6, 8, 0.0)]),
        "other": Outcome("ok", 1.0, [Span(6, 8, 3.0)]),
    }
    sources = [source(span_weight=0.5), source("other", span_weight=2.0)]
    found = token_scores(trajectory, sources, outcomes, reward(granularity="step"), encoder)
    assert found.tolist() == [0, 0, 0, 0, 0.5, 0, 0, 6.0, 0]
    spread = token_scores(trajectory, sources, outcomes, reward(granularity="token"), encoder)
    torch.testing.assert_close(spread, torch.tensor([0.1] * 5 + [0.0] + [3.0] * 2 + [0.0]))


def test_a_source_without_span_weight_counts_with_its_score_alone(encoder):
    trajectory = answered(encoder, "#3")
    outcomes = {"rule": Outcome("ok", 1.0, [Span(0, 2, 9.0)])}
    found = token_scores(trajectory, [source(span_weight=0.0)], outcomes, reward(granularity="step"), encoder)
    assert found.tolist() == [0, 0, 0]


def test_logits_of_a_process_reward_model_become_differences(encoder):
    """P = .8 then .5: .8 and -.3."""
    trajectory = answered(encoder, "1+2=3\n#3")
    outcomes = {"prm": Outcome("ok", 0.0, [Span(0, 5, math.log(4)), Span(6, 8, 0.0)])}
    prm = source("prm", step_reward="difference")
    found = token_scores(trajectory, [prm], outcomes, reward(granularity="step"), encoder)
    torch.testing.assert_close(found[[4, 7]], torch.tensor([0.8, -0.3]))
    assert float(found.sum()) == pytest.approx(0.5)


def test_redistribution_takes_the_models_that_are_read_at_every_token(encoder):
    trajectory = answered(encoder, "#3")
    outcomes = {
        "model": Outcome("ok", 2.5, [Span(0, 1, 1.5), Span(1, 2, -0.5)]),
        "rule": Outcome("ok", 1.0, [Span(0, 2, 9.0)]),
    }
    sources = [source("model", weight=2.0, span_weight=0.0, spreads=True), source(span_weight=0.0)]
    shaping = {"redistribution": "difference"}
    found = token_scores(trajectory, sources, outcomes, reward(shaping=shaping), encoder)
    assert found.tolist() == [3.0, -1.0, 0.0]


def test_step_rewards_reach_the_advantages():
    """lambda 1, gamma 1, no values: A_t is the sum of what follows. Score 1 at the end, .25 for the step at token 1."""
    trajectory = Trajectory(0, "r", [1], [2, 3, 4], torch.zeros(3), False, "", 1.0, 1.0)
    trajectory.token_rewards = torch.tensor([0.0, 0.25, 0.0])
    algorithm = Algorithm(kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False)
    experience = build([trajectory], torch.zeros(1, 3), None, torch.zeros(1, 3), algorithm, 1)
    assert experience.rewards.tolist() == [[0, 0.25, 1.0]]
    assert experience.advantages.tolist() == [[1.25, 1.25, 1.0]]
    metrics = batch_metrics(experience)
    assert metrics["reward/token_mean"] == pytest.approx(0.25 / 3)
    assert metrics["reward/sum_error"] == 0.0


@pytest.mark.parametrize("form", ["difference", "attention"])
@pytest.mark.parametrize(("preserve", "total"), [(True, -2.0), (False, 3.0)])
def test_the_shaped_score_is_the_total_of_a_redistribution(preserve, total, form):
    """Tokens earned 1 and 2; shaping left -2 (a penalty, say): -5 is left for the last token, or nothing."""
    trajectory = Trajectory(0, "r", [1], [2, 3, 4], torch.zeros(3), False, "", 3.0, -2.0)
    trajectory.token_rewards, trajectory.unspread = torch.tensor([1.0, 2.0, 0.0]), 0.0
    algorithm = Algorithm(kl_coef=0.0, whiten_advantages=False)
    shaping = Shaping(redistribution=form, preserve_total=preserve)
    experience = build([trajectory], torch.zeros(1, 3), None, torch.zeros(1, 3), algorithm, 1, shaping)
    assert float(experience.rewards.sum()) == total
    assert experience.rewards[0, :2].tolist() == [1.0, 2.0]
    assert (experience.sum_error == 0.0) == preserve


def test_what_no_token_gets_stays_on_the_last_one():
    """A rule's 4 beside a model's 3, of which the tokens have 1 and 2; and a response that the model cannot spread."""
    sources = [source("model", spreads=True), source(weight=2.0)]
    outcomes = {"model": Outcome("ok", 3.0, [Span(0, 1, 1.0), Span(1, 2, 2.0)]), "rule": Outcome("ok", 2.0)}
    assert unspread(sources, outcomes) == 4.0
    assert unspread(sources, outcomes | {"model": Outcome("ok", 3.0)}) is None
    pair = [Trajectory(k, "r", [1], [2, 3, 4], torch.zeros(3), False, "", 7.0, 7.0) for k in range(2)]
    pair[0].token_rewards, pair[1].token_rewards = torch.tensor([1.0, 2.0, 0.0]), torch.zeros(3)
    pair[0].unspread = 4.0
    algorithm = Algorithm(kl_coef=0.0, whiten_advantages=False)
    shaping = Shaping(redistribution="difference", preserve_total=False)
    found = build(pair, torch.zeros(2, 3), None, torch.zeros(2, 3), algorithm, 1, shaping)
    assert found.rewards.tolist() == [[1.0, 2.0, 4.0], [0.0, 0.0, 7.0]]


def test_agreement_of_a_model_with_a_rule():
    """Right, wrong, right by the rule; the model calls the first wrong, too: 2 of 3 agree, the first wrong one is not
    found."""
    ends = [(0, 5), (6, 11), (12, 14)]
    rule = Outcome("ok", 0.0, [Span(*end, score) for end, score in zip(ends, (1.0, 0.0, 1.0), strict=True)])

    def called(*logits):
        outcomes = {
            "rule": rule,
            "prm": Outcome("ok", 0.0, [Span(*e, s) for e, s in zip(ends, logits, strict=False)]),
        }
        return step_agreement([source(), source("prm", step_reward="raw")], outcomes)

    assert called(-1.0, -1.0, 2.0) == {"step_agreement": pytest.approx(2 / 3), "first_wrong_step_found": 0.0}
    assert called(1.0, -1.0, -2.0) == {"step_agreement": pytest.approx(2 / 3), "first_wrong_step_found": 1.0}
    assert called(1.0, 1.0) == {}  # other steps: nothing to compare


def test_the_table_of_a_sample(encoder):
    trajectory = answered(encoder, "#3")
    trajectory.observed = [False, True, False]
    old = torch.tensor([[-1.0, 0.0, -2.0]])
    algorithm = Algorithm(advantage="reinforce", kl_coef=0.5, whiten_advantages=False)
    experience = build([trajectory], old, old - 0.5, None, algorithm, 1)
    assert token_table(experience, 0, encoder) == {
        "texts": ["#", "3", "<eos>"],
        "offsets": [[0, 1], [1, 2], [2, 2]],
        "mask": [1, 0, 1],
        "rewards": [-0.25, None, 0.75],
        "advantages": [0.5, None, 0.75],
        "log_ratios": [0.5, None, 0.5],
    }
