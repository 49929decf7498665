"""ReFT's baselines: what is kept, what is trained, a stop changes nothing, and keys that say nothing are refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.errors import Interrupted, Refused, RunFailed, UsageError
from rlhfctl.evaluation.answers import Answer
from rlhfctl.models import attention
from rlhfctl.models.load import prepare
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.sections import Reward, Template
from rlhfctl.rewards.build import Source, build_sources
from rlhfctl.rollout.types import EngineLost
from rlhfctl.run_dir import RunDir
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers import ppo_rollout, reft, self_training
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.self_training import distinct_right, right_rows, train_batch
from rlhfctl.trainers.trajectory import Trajectory

REWARD = """\
def score(samples):
    right = [len(sample["response"]) % 2 for sample in samples]
    return [{"score": float(one), "metrics": {"correct": float(one)}} for one in right]
"""
DEFAULTS = ["algorithm.minibatches=1", "algorithm.kl_coef=0.05"]


def overrides(chains: Path, place: Path, method: str) -> list[str]:
    (place / "reward.py").write_text(REWARD)
    return [
        f"method={method}",
        *DEFAULTS,
        f"policy.from_config={chains}/model",
        f"policy.tokenizer={chains}/model",
        f"data.train.0.path={chains}/data/sft.jsonl",
        "data.train.0.limit=24",
        f"data.eval.0.path={chains}/data/eval.jsonl",
        f"reward.sources=[{{kind: python, path: {place}/reward.py}}]",
        "train.eval_samples=4",
        "train.steps=4",
        "train.log_every=1",
        "train.save_every=2",
        "train.batch_size=8",
        "warmup.steps=2",
        "warmup.batch_size=8",
        "rollout.max_new_tokens=8",
    ]


def run(
    path: Path, given: list[str], resume: bool = False, stop_at: int | None = None
) -> list[dict[str, float]]:
    directory = RunDir(path)
    directory.create()

    def stop() -> int | None:
        rows = directory.metrics.read_text().splitlines() if directory.metrics.exists() else []
        return 2 if stop_at is not None and rows and json.loads(rows[-1])["step"] >= stop_at else None

    recipe = load_recipe("quickstart/reft", given).recipe
    ctx = RunContext(recipe, directory, 0, 1, torch.device("cpu"), resume, 1, stop, lambda line: None)
    reft.train(ctx)
    clock = ("seconds", "memory", "tokens_per_second")
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


@pytest.mark.parametrize("method", ["offline_st", "online_st"])
def test_a_stop_in_either_phase_changes_nothing(method: str, chains: Path, tmp_path: Path) -> None:
    given = overrides(chains, tmp_path, method)
    given += ["self_training={samples: 4, keep: 2}"] if method == "offline_st" else ["rollout.n=2"]
    whole = run(tmp_path / "whole", given)
    assert [(row["step"], row["phase"]) for row in whole] == [(s, 1 if s <= 2 else 2) for s in range(7)]
    for resume, stop_at in ((False, 1), (True, 3), (True, 5)):
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", given, resume, stop_at)
    assert run(tmp_path / "parts", given, resume=True) == whole
    for name in ("warmup", "final"):
        one, two = (
            (tmp_path / part / name / "model.safetensors").read_bytes() for part in ("whole", "parts")
        )
        assert one == two
    file = tmp_path / "whole/self_training.jsonl"
    if method == "online_st":
        assert not file.exists()
        assert sum(row["groups/right_kept"] for row in whole[3:]) > 0
        for row in whole[3:]:
            right = row.get("loss/right", 0.0)
            assert (right > 0) == (row["groups/right_kept"] > 0)
            assert row["loss/sft"] == pytest.approx(0.5 * row["loss/gold"] + 0.5 * right, rel=1e-6)
        return
    # Two right answers at most of each question, all different, and training starts where the warm-up started.
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["id"].split("/self/")[0], []).append(row["messages"][-1]["content"])
    assert all(len(own) == len(set(own)) <= 2 for own in answers.values())
    assert all(len(text) % 2 for own in answers.values() for text in own)
    assert not (tmp_path / "whole/sampled").exists()
    assert whole[3]["loss/sft"] > whole[2]["loss/sft"]


def test_online_questions_are_asked_from_the_first_on_and_a_lost_engine_keeps_the_step_before(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 questions, 8 a step: one epoch asks each once, however many steps the warm-up had."""
    asked: list[str] = []
    lost: list[int] = []
    sample = ppo_rollout.sample

    def spy(*given: Any) -> list[Trajectory]:
        if len(asked) == 8 and not lost:
            lost.append(given[5])
            raise EngineLost("stopped: no rollout server is left")
        asked.extend(prompt.sample.id for prompt in given[4])
        return sample(*given)

    monkeypatch.setattr(ppo_rollout, "sample", spy)
    given = overrides(chains, tmp_path, "online_st")
    given = [each for each in given if not each.startswith(("train.steps", "train.batch_size"))]
    given += ["rollout.n=2", "train.batch_size=16", "train.steps=null", "train.epochs=1"]
    with pytest.raises(RunFailed, match="no rollout server is left; the state before it is kept"):
        run(tmp_path / "run", given)
    assert RunDir(tmp_path / "run").newest_checkpoint() == tmp_path / "run/checkpoints/step_000003"
    run(tmp_path / "run", given, resume=True)
    assert lost == [3]
    assert len(asked) == len(set(asked)) == 24


def test_samples_are_judged_under_the_template_section(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model without a system role gets it folded in where the recipe says so."""
    asked: list[bool] = []

    def spy(reward: Reward, encoder: ChatEncoder, template: Template | None = None) -> list[Source]:
        asked.append(template is not None and template.fold_system)
        return build_sources(reward, encoder, template)

    monkeypatch.setattr(self_training, "build_sources", spy)
    given = [*overrides(chains, tmp_path, "offline_st"), "self_training={samples: 4, keep: 2}"]
    run(tmp_path / "run", [*given, "template.fold_system=true"])
    assert asked == [True]


def test_questions_that_are_too_long_are_not_asked(chains: Path, tmp_path: Path) -> None:
    given = [*overrides(chains, tmp_path, "offline_st"), "rollout.max_prompt_length=4"]
    with pytest.raises(Refused, match=r"no question of data.train can be sampled: .*too long"):
        run(tmp_path / "run", given)


def answer(text: str, correct: bool, truncated: bool = False) -> Answer:
    return Answer(text, [], 1, truncated, 0.0, 1, correct=correct)


def test_the_first_distinct_right_answers_are_kept() -> None:
    own = [
        answer("a", False),
        answer("b", True),
        answer("b", True),
        answer("c", True, True),
        answer("d", True),
    ]
    own += [answer("e", True), answer("\n", True)]
    assert distinct_right(own, 2) == ["b", "d"]
    assert distinct_right(own, 9) == ["b", "d", "e"]


def trajectory(sample: str, ids: list[int], correct: float, truncated: bool = False) -> Trajectory:
    found = Trajectory(0, sample, [1, 2], ids, torch.zeros(len(ids)), truncated, "")
    found.reward_metrics = {"correct": correct}
    return found


def test_right_rows_are_distinct_within_a_question() -> None:
    given = [
        trajectory("x", [5, 6], 1.0), trajectory("x", [5, 6], 1.0), trajectory("y", [5, 6], 1.0),
        trajectory("x", [7], 0.0), trajectory("x", [8], 1.0, truncated=True),
    ]  # fmt: skip
    assert right_rows(given) == [([1, 2, 5, 6], [2, 3]), ([1, 2, 5, 6], [2, 3])]


def test_the_loss_is_the_weighted_sum_of_two_token_means() -> None:
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = prepare(
        AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME), torch.device("cpu")
    )
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    gold, right = [([3, 4, 5, 6, 7], [2, 3, 4]), ([9, 8], [1])], [([3, 9, 11], [1, 2])]

    def mean(rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        found = []
        for ids, trained in rows:
            logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
            found += [-logprobs[place - 1, ids[place]] for place in trained]
        return torch.stack(found).mean()

    expected = 0.3 * mean(gold) + 0.7 * mean(right)
    expected.backward()
    ctx = RunContext(None, None, 0, 1, torch.device("cpu"), False, 1, lambda: None, print)  # type: ignore[arg-type]
    for budget in (4, 100):
        model.zero_grad()
        losses = train_batch(ctx, model, gold, right, 0.3, budget)
        assert losses["loss/sft"] == pytest.approx(expected.item(), rel=1e-5)
        assert losses["loss/gold"] == pytest.approx(mean(gold).item(), rel=1e-5)
        assert losses["loss/right"] == pytest.approx(mean(right).item(), rel=1e-5)
        for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)
    alone = train_batch(ctx, model, gold, [], 0.3, 100)
    assert alone["loss/sft"] == pytest.approx(0.3 * mean(gold).item(), rel=1e-5)
    assert "loss/right" not in alone


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["method=online_st"], "algorithm.minibatches is ignored here: it belongs to method reft"),
        (["method=online_st", *DEFAULTS, "value_model.head=normal"], "value_model.head is ignored here"),
        (["method=offline_st", *DEFAULTS, "guard.length=stop"], "guard.length is ignored here"),
        (["method=offline_st", *DEFAULTS, "rollout.n=2"], "offline_st takes self_training.samples"),
        (["method=online_st", *DEFAULTS, "self_training.keep=3"], "self_training.keep is ignored here"),
        (["method=offline_st", *DEFAULTS, "self_training.gold_share=0.2"], "it belongs to method online_st"),
        (["self_training.keep=3"], "self_training is ignored here"),
        (["method=online_st", *DEFAULTS, "deepspeed={zero_stage: 2}"], "online_st has no DeepSpeed engine"),
        (
            ["method=online_st", *DEFAULTS, "reward.sources=[{kind: model, path: rm}]"],
            "needs a reward source of kind verifier",
        ),
    ],
)
def test_keys_that_say_nothing_are_refused(given: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe("quickstart/reft", given)
