"""Rounds of collect and train, and the value fit behind them: one run, and a stop anywhere changes nothing."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rlhfctl.data.load import load_samples
from rlhfctl.errors import Interrupted, Refused, RunFailed, UsageError
from rlhfctl.models.value_model import load_value_model
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.sections import DataSource, Reward, Template
from rlhfctl.rewards.build import Source, build_sources
from rlhfctl.run_dir import RunDir
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers import collect, oreo_rounds, value_phase
from rlhfctl.trainers.context import RunContext

REWARD = '''
def score(samples):
    """An answer with an even number of digits is right: both kinds occur, and a policy can learn it."""
    right = [sum(c.isdigit() for c in s["response"]) % 2 == 0 for s in samples]
    return [{"score": float(each), "metrics": {"correct": float(each)}} for each in right]
'''
Run = Callable[..., RunDir]


@pytest.fixture(scope="module")
def overrides(chains: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("rounds")
    (root / "reward.py").write_text(REWARD)
    return [
        "policy.path=null",
        f"policy.from_config={chains}/model",
        f"policy.tokenizer={chains}/model",
        f"data.train.0.path={chains}/data/prompts.jsonl",
        "data.train.0.limit=24",
        f"data.eval.0.path={chains}/data/eval.jsonl",
        f"reward.sources=[{{kind: python, path: {root}/reward.py}}]",
        "rollout.max_new_tokens=8",
        "algorithm.value_warmup_steps=1",
        "algorithm.truncated=zero",
        "collect.samples=2",
        "value_fit.samples=40",
        "value_fit.steps=4",
        "value_fit.held_out=4",
        "train.steps=3",
        "train.batch_size=8",
        "train.eval_samples=4",
        "train.save_every=2",
        "train.log_every=1",
    ]


def run(
    path: Path, overrides: list[str], resume: bool, asks: int | None = None, rank: int = 0, world: int = 1
) -> RunDir:
    """asks: the how many-th question whether to stop is answered with yes."""
    directory = RunDir(path)
    if rank == 0:
        directory.create()
    if world > 1:
        dist.barrier()
    asked = iter(range(1, 10_000))
    recipe = load_recipe("quickstart/oreo-rounds", overrides).recipe
    ctx = RunContext(
        recipe, directory, rank, world, torch.device("cpu"), resume, 1,
        lambda: 2 if next(asked) == asks else None, lambda line: None,
    )  # fmt: skip
    oreo_rounds.train(ctx)
    return directory


def told(directory: RunDir) -> list[dict[str, float]]:
    clock = ("seconds", "memory", "tokens_per_second")
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


def test_stopped_anywhere_it_ends_the_same(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "PIECE", 24)  # two pieces in each collection
    whole = run(tmp_path / "whole", overrides, resume=False)
    rows = told(whole)
    assert [(row["step"], row["phase"]) for row in rows] == [
        (0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 3), (8, 3), (9, 3), (10, 3)
    ]  # fmt: skip
    parted = tmp_path / "parted"
    # Between the pieces of a collection, inside a round, between rounds, inside the fit.
    for number, asks in enumerate((1, 3, 2, 4, 2, 4)):
        with pytest.raises(Interrupted):
            run(parted, overrides, number > 0, asks)
    again = run(parted, overrides, resume=True)
    assert told(again) == rows
    for name in (
        "rounds/1/trajectories.jsonl",
        "rounds/2/trajectories.jsonl",
        "rounds/1/policy/model.safetensors",
        "rounds/1/value_model/value_head.safetensors",
        "final/model.safetensors",
        "critic/value_head.safetensors",
        "value_model/value_head.safetensors",
        "value_model/model.safetensors",
    ):
        assert (whole.path / name).read_bytes() == (again.path / name).read_bytes(), name

    # The second round's samples are the new policy's, and KL is measured to it: none before it moves.
    first, second = (
        {
            sample.id: sample.response
            for sample in load_samples([DataSource(path=str(file))], judged=True).samples
        }
        for file in (whole.round(number) / "trajectories.jsonl" for number in (1, 2))
    )
    both = first.keys() & second.keys()
    assert len(both) > 24
    assert sum(first[id] == second[id] for id in both) < len(both) / 2
    assert rows[4]["kl/exact"] == rows[5]["kl/exact"] == 0.0
    assert rows[3]["kl/exact"] > 0.0
    fitted = load_value_model(whole.value_model, torch.float32, torch.device("cpu"))
    assert fitted.kind == "token_sum"
    assert fitted.facts["alpha"] == rows[-1]["value_fit/alpha"]
    assert 0 < fitted.facts["samples"] <= 40

    # What a value was fitted to cannot be trained further under it.
    with pytest.raises(Refused, match="has fitted a value to the policy of step 6"):
        run(tmp_path / "whole", [each.replace("train.steps=3", "train.steps=4") for each in overrides], True)


def test_a_last_round_of_more_steps_has_its_value_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round was trained before train.steps was raised from 300 to 400."""
    directory = RunDir(tmp_path)
    for goal, step in ((directory.round(1) / "policy", 300), (directory.final, 700)):
        text = json.dumps({"step": step})
        directory.commit_phase(goal, lambda place, text=text: (place / "phase.json").write_text(text))
    fitted = []
    monkeypatch.setattr(value_phase, "train", fitted.append)

    def train(steps: int) -> None:
        recipe = load_recipe("quickstart/oreo-rounds", [f"train.steps={steps}"]).recipe
        ctx = RunContext(recipe, directory, 0, 1, torch.device("cpu"), True, 2, lambda: None, print)
        oreo_rounds.train(ctx)

    train(400)
    assert [ctx.phase.first for ctx in fitted] == [700]
    with pytest.raises(Refused, match="has fitted a value to the policy of step 700"):
        train(500)


def one_of_two(rank: int, path: Path, overrides: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    run(path, overrides, False, rank=rank, world=2)
    dist.destroy_process_group()


@pytest.mark.heavy
def test_two_processes_collect_train_and_fit_what_one_does(overrides: list[str], tmp_path: Path) -> None:
    """Each samples half of the prompts and trains on half of every batch. Sums in another order differ in their last
    digits, which AdamW lets grow; half of the samples, or a mean over one rank's prefixes, would differ by far more."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=one_of_two, args=(rank, tmp_path / "two", overrides)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    one = run(tmp_path / "one", overrides, resume=False)
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]
    two = RunDir(tmp_path / "two")
    for name in ("rounds/1/trajectories.jsonl", "rounds/2/trajectories.jsonl"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name
    alone, together = told(one), told(two)
    assert len(alone) == len(together) == 11
    for first, second in zip(alone, together, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            close = second[key] if second[key] is None else pytest.approx(second[key], rel=1e-3, abs=1e-5)
            assert first[key] == close, (first["step"], key)
    for name in ("final/model.safetensors", "value_model/value_head.safetensors"):
        first_weights, second_weights = load_file(one.path / name), load_file(two.path / name)
        for key, tensor in first_weights.items():
            assert float((tensor - second_weights[key]).abs().max()) < 1e-4, (name, key)


def test_the_initial_policy_as_reference_and_balanced_samples(
    overrides: list[str], chains: Path, tmp_path: Path
) -> None:
    from rlhfctl.models.export import export_policy
    from rlhfctl.models.load import load_causal_lm
    from rlhfctl.recipe.sections import Policy

    spec = Policy(from_config=str(chains / "model"), tokenizer=str(chains / "model"))
    export_policy(load_causal_lm(spec, torch.device("cpu"), 5), spec, tmp_path / "start", merge=False)
    mine = [
        each
        for each in overrides
        if not each.startswith(("policy.", "data.eval", "value_fit.", "collect.samples"))
    ]
    mine += [f"policy.path={tmp_path}/start", "data.eval=[]", "value_fit=null"]
    mine += [
        "collect.reference=initial",
        "collect.balance=1",
        "collect.samples=4",
    ]
    directory = run(tmp_path / "run", mine, resume=False)
    rows = told(directory)
    assert rows[3]["phase"] == 2
    assert rows[3]["kl/exact"] > 1e-6  # the policy of round 1 against the one it started from
    lines = (directory.round(2) / "trajectories.jsonl").read_text().splitlines()
    kept: dict[str, list[bool]] = {}
    for line in map(json.loads, lines):
        kept.setdefault(line["prompt_id"], []).append(line["correct"])
    assert all(len(each) == len(set(each)) for each in kept.values())
    assert not (directory.path / "critic").exists()
    with pytest.raises(Refused, match=r"no prompt of data.train can be sampled: .*too long"):
        run(tmp_path / "short", [*mine, "rollout.max_prompt_length=4"], resume=False)
    assert (directory.value_model / "config.json").is_file()


def test_samples_that_one_source_could_not_score_are_failures(overrides: list[str], tmp_path: Path) -> None:
    """Another says whether they are right; without a reward they would be left out, and nobody would know why."""
    (tmp_path / "second.py").write_text(
        "def score(samples):\n    return [None if '1' in each['response'] else 0.0 for each in samples]\n"
    )
    more = f"reward.sources.1={{kind: python, path: {tmp_path}/second.py}}"
    with pytest.raises(RunFailed, match=r"samples could not be judged, 0 allowed .*first: second\.score: "):
        run(tmp_path / "run", [*overrides, more], resume=False)


def test_samples_are_judged_under_the_template_section(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As preflight and evaluation do: a reward model without a system role gets it folded in."""
    asked: list[bool] = []

    def spy(reward: Reward, encoder: ChatEncoder, template: Template | None = None) -> list[Source]:
        asked.append(template is not None and template.fold_system)
        return build_sources(reward, encoder, template)

    for module in (oreo_rounds, value_phase):
        monkeypatch.setattr(module, "build_sources", spy)
    run(tmp_path / "rounds", [*overrides, "template.fold_system=true", "collect.rounds=1"], resume=False)
    assert asked == [True] * 2


def test_rounds_with_a_delimiter_of_their_own(overrides: list[str], tmp_path: Path) -> None:
    """What a round writes has the steps that it was told of, and is trained on by them."""
    mine = [each for each in overrides if not each.startswith("value_fit.")]
    mine += ["value_fit=null", "data.eval=[]", "collect.rounds=1", "algorithm.level=step"]
    directory = run(tmp_path / "run", [*mine, "algorithm.step_delimiters=['=']"], resume=False)
    lines = map(json.loads, (directory.round(1) / "trajectories.jsonl").read_text().splitlines())
    parted = [line for line in lines if len(line.get("steps", [])) > 1]
    assert parted
    assert all("=".join(line["steps"]) == line["response"] for line in parted)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["reward=null", "data.eval=[]"], "collect and value_fit of an oreo recipe needs reward"),
        (["collect=null"], "value_fit needs value_fit.prompts"),
        (["deepspeed={zero_stage: 1}"], "collect and value_fit of an oreo recipe samples"),
        (["rollout.n=2"], "rollout.n is ignored here"),
        (["rollout.temperature=0.5", "collect=null", "value_fit=null"], "rollout.temperature is ignored here"),
        (["rollout.engine=vllm_server"], "oreo samples with hf or vllm"),
        (["reference=x"], "set collect.reference to initial"),
        (["collect.reference=initial", "policy.from_config=a", "policy.tokenizer=a", "policy.path=null"],
         "collect.reference initial needs policy.path"),
        (["policy.lora={merge_final: false}"], "value_fit trains all of the final policy's weights"),
        (["policy.lora={merge_final: false}", "value_fit=null"], "policy.lora.merge_final false"),
        (["collect=null", "value_fit=null", "data.eval=[]"], "give both, or neither"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit(more: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe("quickstart/oreo-rounds", more)
