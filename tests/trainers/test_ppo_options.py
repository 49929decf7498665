"""The options of ppo in real runs of a tiny model: each acts, shows it in a metric, and comes back after a resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rlhfctl.algorithms.adaptive_kl import adapted_coef
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.trainers.ppo_loss import Sums, importance_of

GAE = ("algorithm.advantage=gae", "rollout.n=1")
CHECKPOINTS = ("train.save_every=1", "train.keep_checkpoints=9")


def weights(run, step=None):
    return load_file(
        (run.checkpoints / f"step_{step:06d}/policy" if step else run.final) / "model.safetensors"
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_dynamic_sampling_fills_the_step_with_groups_that_tell_something(train):
    records, _ = train("dynamic", "rollout.dynamic_sampling=true", "rollout.max_refills=50")
    plain, _ = train("plain", "train.steps=1")
    assert 0.2 < plain[0]["groups/zero_variance_fraction"] < 0.8
    assert plain[0]["samples"] == 16
    for record in records:
        assert record["groups/zero_variance_fraction"] == 0
        assert record["samples"] == 16
        assert record["groups/refills"] >= 1
        assert record["groups/sampled"] > 8
        assert record["groups/dropped_fraction"] == pytest.approx(1 - 8 / record["groups/sampled"])
        assert record["groups/skipped_tokens_fraction"] == 0


def test_rewards_are_normalised_within_the_prompt(train):
    """Two samples of different reward become -1 and 1, of equal reward 0."""
    records, _ = train("normal", "reward.shaping.normalisation=group", "train.steps=1")
    flat = records[0]["groups/zero_variance_fraction"]
    assert 0.2 < flat < 0.8
    assert records[0]["reward/std"] == pytest.approx((1 - flat) ** 0.5, rel=0.05)


def test_refilled_samples_are_seen_once_by_the_running_normalisation(train):
    options = ("rollout.dynamic_sampling=true", "rollout.max_refills=50", "train.steps=1")
    records, run = train("running", "reward.shaping.normalisation=running", *options, *CHECKPOINTS)
    assert records[0]["groups/refills"] >= 1
    state = json.loads((run.checkpoints / "step_000001/trainer.json").read_text())
    assert state["running"]["count"] == 2 * records[0]["groups/sampled"]


def test_dynamic_sampling_stops_refilling_at_its_bound(train):
    records, _ = train("bounded", "rollout.dynamic_sampling=true", "rollout.max_refills=1", "train.steps=6")
    assert all(record["groups/refills"] <= 1 for record in records)
    smaller = [record for record in records if record["samples"] < 16]
    assert smaller
    for record in smaller:
        kept = record["samples"] / 2
        assert record["groups/dropped_fraction"] == pytest.approx(1 - kept / record["groups/sampled"])


def test_a_step_without_any_signal_keeps_its_first_groups_and_is_noticed(context, tmp_path):
    from rlhfctl.trainers import ppo

    ctx = context("flat", "rollout.dynamic_sampling=true", "rollout.max_refills=2", "train.steps=1")
    (tmp_path / "reward.py").write_text("def score(samples):\n    return [1.0 for _ in samples]\n")
    said = []
    ctx.say = said.append
    ppo.train(ctx)
    assert any("all samples of every prompt have the same reward" in line for line in said)


@pytest.mark.parametrize(
    "options",
    [
        (
            "rollout.dynamic_sampling=true",
            "algorithm.kl_coef=0.1",
            "algorithm.kl_target=0.001",
            "algorithm.kl_horizon=100",
        ),
        (*GAE, "algorithm.value_warmup_steps=3", "value_model.shared_trunk=true"),
        (*GAE, "algorithm.value_warmup_steps=1", "algorithm.minibatches=2", "policy.dtype=bfloat16"),
    ],
    ids=["dynamic sampling, adaptive kl", "warm-up on a shared trunk", "warm-up, bfloat16"],
)
def test_a_resumed_run_is_the_uninterrupted_one(train, options):
    whole, run = train("whole", *options)
    halves, _ = train("parts", *options, stop_after=2)
    assert len(halves) == 2
    parts, resumed = train("parts", *options, resume=True)
    assert parts == whole
    assert same(weights(run), weights(resumed))


def test_the_kl_coefficient_follows_its_target(train):
    options = ("algorithm.kl_coef=0.1", "algorithm.kl_target=0.001", "algorithm.kl_horizon=100")
    records, _ = train("target", *options, "algorithm.minibatches=2")
    expected = 0.1
    for record in records:
        assert record["kl/coef"] == pytest.approx(expected, rel=1e-8)
        expected = adapted_coef(expected, record["kl/reference"], 0.001, 100, 16)
    # No KL in the first step: a fifth of the coefficient less per 100 samples.
    assert records[1]["kl/coef"] == pytest.approx(0.1 * (1 - 0.2 * 0.16))
    assert records[-1]["kl/coef"] != records[1]["kl/coef"]


@pytest.mark.parametrize("shared", ["true", "false"])
def test_value_warm_up_moves_the_value_model_alone(train, shared):
    options = (
        *GAE,
        f"value_model.shared_trunk={shared}",
        "algorithm.value_warmup_steps=2",
        "optim.weight_decay=0.1",
    )
    records, run = train("warm", *options, *CHECKPOINTS)
    assert [record["value/warmup"] for record in records] == [1, 1, 0, 0]
    assert [record["clip/fraction"] for record in records[:2]] == [0, 0]
    assert records[1]["kl/policy"] < 1e-12
    assert same(weights(run, 1), weights(run, 2))
    assert not same(weights(run, 2), weights(run, 3))
    heads = [
        load_file(run.checkpoints / f"step_{step:06d}/critic.safetensors")["head.weight"] for step in (1, 2)
    ]
    assert not torch.equal(*heads)
    assert heads[0].abs().max() > 0
    if shared == "false":
        assert [record["grad_norm"] for record in records[:2]] == [0, 0]


def test_the_entropy_bonus_keeps_the_entropy_up(train):
    """One update of the whole batch with the token mean: the term is minus coefficient times entropy."""
    records, _ = train("bonus", "algorithm.entropy_coef=0.5", "train.steps=6")
    without, _ = train("without", "train.steps=6")
    assert records[0]["loss/entropy"] == pytest.approx(-0.5 * records[0]["entropy"], rel=1e-5)
    assert records[-1]["entropy"] > records[0]["entropy"]
    assert records[-1]["entropy"] > without[-1]["entropy"]
    assert records[0]["groups/skipped_tokens_fraction"] == 0
    assert "loss/entropy" not in without[0]


def test_gspo_clips_whole_responses(train):
    options = ("algorithm.loss=gspo", "algorithm.loss_mean=sequence", "algorithm.ppo_epochs=2")
    records, _ = train("gspo", *options, "algorithm.clip_epsilon=0.001")
    assert all(
        0 < record["clip/sequence_fraction"] <= 0.5 for record in records[1:]
    )  # the second of two passes
    once, _ = train("once", *options, "algorithm.clip_epsilon=0.9")
    assert all(record["clip/sequence_fraction"] == 0 for record in once)


@pytest.mark.parametrize(
    ("correction", "expected", "capped", "masked"),
    [
        # trainer / sampler 4, .5 | 1, 1; cap 3. sqrt(4 * .5) = 1.41
        ({"importance_correction": "tis", "importance_cap": 3.0}, [3, 0.5, 1, 1], 1, 0),
        ({"importance_correction": "icepop"}, [4, 0.5, 1, 1], 0, 0),  # .5 .. 5
        ({"importance_correction": "icepop", "importance_bounds": (0.6, 3.0)}, [0, 0, 1, 1], 0, 2),
        ({"importance_correction": "sequence_mask"}, [0, 0, 1, 1], 1, 2),  # .9 .. 1.1
        ({"importance_correction": "sequence_mask", "importance_bounds": (1.2, 2.0)}, [2, 0.5, 0, 0], 1, 2),
    ],
)
def test_importance_weights_by_the_recipe(correction, expected, capped, masked):
    sampler = torch.tensor([-1.0, -2.0, -3.0, -1.0])
    trainer = sampler + torch.tensor([4.0, 0.5, 1.0, 1.0]).log()
    sums = Sums()
    found = importance_of(Algorithm(**correction), trainer, sampler, torch.tensor([2, 2]), sums)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert sums.values["importance"] == pytest.approx(sum(expected))
    assert (sums.values["importance_capped"], sums.values["importance_masked"]) == (capped, masked)


@pytest.mark.parametrize("correction", ["icepop", "sequence_mask"])
def test_corrections_take_nothing_from_an_exact_sampler(train, correction):
    records, run = train("corrected", f"algorithm.importance_correction={correction}", "train.steps=2")
    plain, exact = train("plain", "train.steps=2")
    for record in records:
        assert record["importance/mean"] == pytest.approx(1, abs=1e-5)
        assert record["importance/masked_fraction"] == 0
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(exact)[name], atol=1e-4, rtol=0)
    assert plain[0]["reward/mean"] == records[0]["reward/mean"]
