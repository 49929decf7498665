"""Metrics over rows of unequal length, by hand: what stands in the padding is in none of them."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from rlhfctl.data.encode import PromptRow
from rlhfctl.data.samples import Sample
from rlhfctl.models.load import load_causal_lm
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.sections import Policy
from rlhfctl.rewards.normalise import Running
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rollout.engine import HfEngine
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers import ppo_rollout
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.evaluate import Evaluator
from rlhfctl.trainers.experience import Experience
from rlhfctl.trainers.ppo_metrics import batch_metrics
from rlhfctl.trainers.rm_evaluate import Scored, pair_metrics
from rlhfctl.trainers.trajectory import Trajectory


def trajectory(index, tokens):
    return Trajectory(index, f"r{index}", [1], list(range(tokens)), torch.zeros(tokens), False, "", 1.0, 1.0)


def test_a_batch_of_two_rows():
    """log pi - log pi_ref is -25, .5, 21 and 1; 25 and 21 are large on either side. Padding: 90 everywhere."""
    difference = torch.tensor([[-25.0, 0.5, 21.0], [1.0, 90.0, 90.0]])
    experience = Experience(
        trajectories=[trajectory(0, 3), trajectory(1, 1)],
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        rollout_logprobs=torch.zeros(2, 3),
        old_logprobs=difference,
        ref_logprobs=torch.zeros(2, 3),
        values=torch.tensor([[1.0, 2.0, 3.0], [6.0, 90.0, 90.0]]),
        advantages=torch.tensor([[2.0, 4.0, 6.0], [4.0, 90.0, 90.0]]),
        returns=torch.tensor([[1.0, 1.0, 1.0], [5.0, 90.0, 90.0]]),
        zero_variance_groups=0,
    )
    metrics = batch_metrics(experience)
    assert metrics["kl/large_fraction"] == 2 / 4
    assert metrics["kl/reference"] == pytest.approx(-2.5 / 4)
    assert metrics["value/mean"] == 12 / 4
    assert metrics["returns/mean"] == 8 / 4
    assert metrics["advantage/mean"] == 4.0
    assert metrics["advantage/std"] == pytest.approx(math.sqrt(8 / 4))


class Judge:
    """Gives every answer one score, and metrics."""

    weight, span_weight = 1.0, 0.0

    def __init__(self, name, score, metrics):
        self.name, self.outcome = name, Outcome("ok", score, metrics=metrics)

    def score(self, samples):
        return [self.outcome for _ in samples]


def test_a_sources_own_metrics_replace_none_of_ours():
    """Names that are taken (raw, clipped, reward, response_length, another source); of two alike the first counts."""
    taken = {"raw": 9.0, "clipped": 9.0, "reward": 9.0, "response_length": 9.0, "rule": 9.0}
    sources = [Judge("rule", 1.0, {"correct": 1.0}), Judge("mine", 2.0, {**taken, "correct": 0.0})]
    recipe = load_recipe("quickstart/ppo", ["reward.shaping.clip=[0, 2]", "rollout.n=1"]).recipe
    prompt = PromptRow(Sample("r0", [{"role": "user", "content": "1?"}]), [1])
    ctx = SimpleNamespace(rank=0, world=1)
    one = trajectory(0, 3)
    scored, _ = ppo_rollout.score(ctx, recipe, sources, [prompt], [one], 1, 0, None)
    found = ppo_rollout.usable(recipe, sources, scored, 1, 0, Running()).metrics
    assert (found["reward/raw"], found["reward/clipped"], found["reward/rule"]) == (3.0, 2.0, 1.0)
    assert (found["reward/correct"], found["reward/reward"]) == (1.0, 9.0)

    evaluator = object.__new__(Evaluator)
    evaluator.ctx, evaluator.prompts, evaluator.sources, evaluator.sampling = ctx, [prompt], sources, None
    evaluator.encoder = SimpleNamespace(decode_response=lambda ids: "2")
    engine = SimpleNamespace(generate=lambda requests, sampling: [SimpleNamespace(response_ids=[5, 6])])
    found = evaluator._greedy_answers(engine)
    assert (found["eval/reward"], found["eval/response_length"], found["eval/accuracy"]) == (3.0, 2.0, 1.0)


def test_the_margin_of_a_pair_is_in_the_loss_of_an_evaluation():
    """Gaps 1 and -3, margins 2 and 0 of which half counts: softplus(0) and softplus(3)."""
    pairs = [
        Scored(0, (2.0, 5), (1.0, 5), None, 2.0, []),
        Scored(1, (0.0, 5), (3.0, 5), None, 0.0, []),
    ]
    metrics = pair_metrics(pairs, 0.5, 0.0)
    assert metrics["eval/loss"] == pytest.approx((math.log(2) + math.log1p(math.exp(3))) / 2, abs=1e-12)
    assert metrics["eval/accuracy"] == 0.5


@pytest.mark.parametrize("rows", [1, 3])
def test_the_held_out_loss_is_a_mean_over_answers_not_prompts(chains, tmp_path, rows):
    overrides = [
        f"policy.from_config={chains}/model",
        f"policy.tokenizer={chains}/model",
        f"data.train=[{{path: {chains}/data/sft.jsonl}}]",
        f"data.eval=[{{path: {chains}/data/sft.jsonl, limit: {rows}}}]",
        "reward=null",
        "rollout=null",
    ]
    recipe = load_recipe("quickstart/sft", overrides).recipe
    directory = RunDir(tmp_path / "run")
    directory.create()
    ctx = RunContext(recipe, directory, 0, 1, torch.device("cpu"), False, 1, lambda: None, lambda line: None)
    model = load_causal_lm(
        Policy(from_config=str(chains / "model"), tokenizer=str(chains / "model")), ctx.device, 3
    )
    evaluator = Evaluator(ctx, policy_encoder(recipe.policy, ctx.say))
    found = evaluator.run(model, HfEngine(model))["eval/loss"]
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    total, tokens = 0.0, 0
    for ids, trained in zip(evaluator.rows.ids, evaluator.rows.trained, strict=True):
        assert 0 < len(trained) < len(ids) - 1
        with torch.no_grad():
            logits = plain.eval()(torch.tensor([ids])).logits[0]
        total += float(
            cross_entropy(
                logits[[place - 1 for place in trained]],
                torch.tensor([ids[place] for place in trained]),
                reduction="sum",
            )
        )
        tokens += len(trained)
    assert len(evaluator.rows.ids) == rows
    assert found == pytest.approx(total / tokens, abs=1e-5)
