"""Forward passes that a ppo step does without: rows that cannot move a weight, values beside log-probabilities."""

import pytest
import torch

from rlhfctl.models.packing import pack
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.trainers import ppo_experience
from rlhfctl.trainers.experience import build, sharing_of
from rlhfctl.trainers.ppo_experience import make_experience
from rlhfctl.trainers.ppo_loss import Pass, Sums
from rlhfctl.trainers.ppo_models import build_optimizers, load_models
from rlhfctl.trainers.ppo_update import minibatches, train_minibatch, update, update_metrics, with_gradient
from rlhfctl.trainers.trajectory import Trajectory
from rlhfctl.trainers.value_once import passes_once


def trajectory(index, response, shaped, encoder):
    return Trajectory(
        index=index,
        sample_id=f"row{index}",
        prompt_ids=[3, 4, 5],
        response_ids=response,
        logprobs=torch.full((len(response),), -2.0),
        truncated=False,
        text=encoder.decode_response(response),
        reward=shaped,
        shaped=shaped,
    )


@pytest.fixture
def batch(context):
    """Three prompts of two samples; the first prompt's scores are equal, and 5 of 13 tokens are its."""

    def make(*overrides):
        ctx = context("passes", "algorithm.loss_mean=token", *overrides)
        encoder = policy_encoder(ctx.recipe.policy, ctx.say)
        responses = [[5, 6, 7], [8, 9], [4], [5, 5], [9, 8, 7], [6, 4]]
        scores = [1.0, 1.0, 0.0, 1.0, 2.0, 0.0]
        rows = [
            trajectory(index, response, score, encoder)
            for index, (response, score) in enumerate(zip(responses, scores, strict=True))
        ]
        return ctx, load_models(ctx, ctx.recipe), rows

    return make


def gradients(ctx, models, rows):
    experience = make_experience(ctx, ctx.recipe, models, rows)
    sums = Sums()
    train_minibatch(
        ctx, ctx.recipe, models, experience, list(range(len(rows))), sums, Pass(first=True, warming=False)
    )
    return {name: p.grad for name, p in models.policy.named_parameters()}, sums, experience


def test_rows_without_signal_are_skipped_and_the_gradient_is_the_same(batch):
    ctx, models, rows = batch()
    mine, sums, experience = gradients(ctx, models, rows)
    assert with_gradient(ctx.recipe.algorithm, models, experience, list(range(6))) == [2, 3, 4, 5]
    assert (sums.values["tokens"], sums.values["skipped"]) == (8, 5)
    metrics = update_metrics(ctx.recipe.algorithm, sums.values, {"policy": [1.0]})
    assert metrics["groups/skipped_tokens_fraction"] == pytest.approx(5 / 13)

    # A bonus too small to count makes every row pass.
    ctx, models, rows = batch("algorithm.entropy_coef=1e-30")
    whole, sums, _ = gradients(ctx, models, rows)
    assert (sums.values["tokens"], sums.values["skipped"]) == (13, 0)
    for name, gradient in whole.items():
        assert float(gradient.abs().max()) > 1e-6, name
        torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_skipped_rows_stay_in_the_denominator(batch, mean):
    found = []
    for bonus in (0.0, 1e-30):  # with a bonus too small to count every row passes
        ctx, models, rows = batch()
        ctx.recipe.algorithm.loss_mean, ctx.recipe.algorithm.entropy_coef = mean, bonus
        gradient, sums, _ = gradients(ctx, models, rows)
        found.append(gradient)
        assert sums.values["skipped"] == (0 if bonus else 5)
    for name, gradient in found[0].items():
        assert float(gradient.abs().max()) > 1e-6, name
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)


def test_numbers_of_a_pack_reach_their_own_rows(batch):
    """A prompt whose samples share no forward pass stands behind the groups that do, before them in the batch."""
    ctx, models, rows = batch("algorithm.old_logprobs=recompute", "algorithm.minibatches=2")
    rows[0].prompt_ids, rows[1].prompt_ids = [2], [9, 9]
    sharing = sharing_of(rows)
    packs = sharing.plan(range(6), ctx.recipe.train.tokens_per_microbatch, 0, 1)
    assert any(sharing.pack(members, ctx.device, 1).rows != members for members in packs)
    experience = make_experience(ctx, ctx.recipe, models, rows)
    for row, length in enumerate(experience.response_lengths):
        with torch.no_grad():
            alone = models.logprobs(pack([row], experience.ids, experience.trained))
        torch.testing.assert_close(experience.old_logprobs[row, :length], alone, atol=1e-5, rtol=0)


def test_the_sampler_is_compared_before_the_first_optimizer_step(batch):
    """kl/rollout is of the first of four minibatches: KL(sampler, trainer) from tokens that the sampler drew."""
    ctx, models, rows = batch("algorithm.ppo_epochs=2", "algorithm.minibatches=2", "optim.lr=0.1")
    optimizers = build_optimizers(ctx.recipe, models, 4)
    experience = make_experience(ctx, ctx.recipe, models, rows)
    first = minibatches(6, 2, ctx.recipe.seed, 0, 0)[0]
    moving = with_gradient(ctx.recipe.algorithm, models, experience, first)
    assert len(moving) > 0
    with torch.no_grad():
        trainer = models.logprobs(pack(moving, experience.ids, experience.trained))
    ratio = (trainer + 2.0).exp()  # the sampler's log-probabilities are -2
    expected = float((ratio - 1 - ratio.log()).mean())
    metrics = update(ctx, ctx.recipe, models, optimizers, experience, 0)
    assert metrics["kl/rollout"] == pytest.approx(expected, rel=1e-5)
    assert metrics["kl/policy"] > 0.01  # the passes after it are of another policy


def test_terms_beside_the_policy_loss_need_every_row(batch):
    for overrides in (
        ("algorithm.kl_coef=0.1", "algorithm.kl_in=loss"),
        ("algorithm.advantage=gae", "value_model.shared_trunk=true"),
    ):
        ctx, models, rows = batch(*overrides)
        _, sums, _ = gradients(ctx, models, rows)
        assert (sums.values["tokens"], sums.values["skipped"]) == (13, 0)


def test_a_minibatch_of_nothing_but_such_rows_has_a_gradient_of_zero(batch):
    ctx, models, rows = batch()
    gradient, sums, _ = gradients(ctx, models, rows[:2])
    assert all(value is None for value in gradient.values())
    assert sums.values["tokens"] == 0
    metrics = update_metrics(ctx.recipe.algorithm, sums.values, {"policy": [0.0]})
    assert metrics["groups/skipped_tokens_fraction"] == 1
    assert metrics["entropy"] != metrics["entropy"]  # of nothing


def test_a_shared_trunk_gives_log_probabilities_and_values_in_one_pass(batch):
    options = ("algorithm.advantage=gae", "value_model.head=normal", "algorithm.minibatches=2")
    ctx, models, rows = batch(*options, "value_model.shared_trunk=true", "algorithm.old_logprobs=recompute")
    calls = []
    models.policy.base_model.register_forward_hook(lambda *_: calls.append(1))
    experience = make_experience(ctx, ctx.recipe, models, rows)
    assert len(calls) == 1
    packed = pack(list(range(6)), experience.ids, experience.trained)
    with torch.no_grad():
        logprobs, values = models.logprobs(packed), models.values(packed)
    for padded, expected in ((experience.old_logprobs, logprobs), (experience.values, values)):
        torch.testing.assert_close(padded[experience.mask], expected, atol=1e-5, rtol=0)
    assert float(values.abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("dtype", "options", "own_pass"),
    [
        ("float32", (), False),
        ("bfloat16", (), False),
        ("bfloat16", ("algorithm.old_logprobs=recompute",), True),
        ("bfloat16", ("algorithm.importance_correction=tis",), True),
        ("bfloat16", ("algorithm.minibatches=2",), True),
        ("float32", ("rollout.engine=vllm",), True),
    ],
)
def test_a_penalty_in_bfloat16_needs_no_pass_of_its_own(batch, dtype, options, own_pass):
    """It is of the sampler's log-probabilities; the ratio's come from the update's own first pass."""
    ctx, models, rows = batch("algorithm.kl_coef=0.1", f"policy.dtype={dtype}", *options)
    calls = []
    models.policy.base_model.register_forward_hook(lambda *_: calls.append(1))
    experience = make_experience(ctx, ctx.recipe, models, rows)
    assert bool(calls) == own_pass
    sampled = torch.where(experience.mask, -2.0, 0.0)
    assert torch.equal(experience.old_logprobs, sampled) == (not own_pass)
    assert experience.old_known == (own_pass or dtype == "float32")


def test_build_takes_the_coefficient_of_the_step(batch):
    """dr_grpo over two samples of one prompt: penalties of 0.5 and 0 in the totals, times 0.1 or 0.2."""
    ctx, _, rows = batch("algorithm.advantage=dr_grpo", "algorithm.kl_coef=0.1")
    old = torch.zeros(2, 3)
    reference = torch.tensor([[-0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for coef, expected in ((None, 0.025), (0.2, 0.05)):
        found = build(rows[:2], old, reference, None, ctx.recipe.algorithm, 2, kl_coef=coef)
        assert found.kl_coef == (coef or 0.1)
        torch.testing.assert_close(found.advantages[:, 0], torch.tensor([-expected, expected]))


@pytest.mark.parametrize(
    ("shaped", "mean"), [("algorithm.value_clip=0.2", "token"), ("algorithm.gae_lambda=0.5", "sequence")]
)
def test_a_value_model_that_sees_the_batch_once_passes_once(batch, monkeypatch, shaped, mean):
    """Read and trained in one forward pass: advantages, loss and gradients of reading first and training after."""
    found = []
    for once in (True, False):
        options = (
            "algorithm.advantage=gae",
            "value_model.head=normal",
            "train.tokens_per_microbatch=9",
            shaped,
        )
        ctx, models, rows = batch(*options)
        ctx.recipe.algorithm.gamma, ctx.recipe.algorithm.loss_mean = 0.9, mean
        assert passes_once(ctx.recipe, models)
        if not once:
            monkeypatch.setattr(ppo_experience, "passes_once", lambda recipe, models: False)
        calls = []
        models.critic.trunk.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        experience = make_experience(ctx, ctx.recipe, models, rows)
        sums = Sums(dict(Sums().values) | (experience.value_sums or {}))
        whole = Pass(first=True, warming=False)
        train_minibatch(ctx, ctx.recipe, models, experience, list(range(len(rows))), sums, whole)
        gradients_of = {name: p.grad for name, p in models.critic.named_parameters()}
        found.append((len(calls), experience, sums.values, gradients_of))
    (calls, mine, sums, gradient), (twice, plain, expected_sums, expected) = found
    assert twice == 2 * calls > 2
    torch.testing.assert_close(mine.values, plain.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(mine.advantages, plain.advantages, atol=1e-5, rtol=0)
    assert sums["value_loss"] == pytest.approx(expected_sums["value_loss"], abs=1e-6)
    assert float(gradient["head.weight"].abs().max()) > 1e-3
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], atol=1e-6, rtol=1e-5)


def test_a_value_model_that_sees_the_batch_again_is_read_first(batch):
    for overrides in (
        ("algorithm.ppo_epochs=2",),
        ("algorithm.minibatches=2",),
        ("value_model.shared_trunk=true",),
    ):
        ctx, models, _ = batch("algorithm.advantage=gae", *overrides)
        assert not passes_once(ctx.recipe, models)
    ctx, models, _ = batch("algorithm.advantage=gae")
    assert passes_once(ctx.recipe, models)
    models.critic_passes.collective = True  # as with ZeRO, where all ranks pass together
    assert not passes_once(ctx.recipe, models)
