"""rm over an encoder: trained, stopped, resumed, saved, and read back by transformers with equal scores."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from rlhfctl.data.encode_judged import JudgedRow, Reading
from rlhfctl.errors import Interrupted, Refused
from rlhfctl.models.encoder_training import last_linear
from rlhfctl.models.reward_model import load_reward_model
from rlhfctl.models.reward_training import load_for_training
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.sections import Policy, RewardModelling
from rlhfctl.rewards.model import ModelReward
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers import reward_model
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.rm_data import score_pack

CPU = torch.device("cpu")
TEMPLATE = "[CLS]{% for m in messages %}{{ m.content }}[SEP]{% endfor %}"
RECIPE = """\
task: rm
name: tiny
policy: {{path: {here}/bert, tokenizer: {tokenizer}, chat_template: {here}/template.jinja}}
data: {{train: [{{path: {here}/pairs.jsonl}}], eval: [{{path: {here}/fresh.jsonl}}], max_length: 64}}
optim: {{lr: 2.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{steps: 16, batch_size: 16, tokens_per_microbatch: 256, eval_every: 16, save_every: 8}}
"""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
}
WORDS = ["river", "house", "green", "seven", "walks", "under", "paper", "cloud"]


def pairs(count: int, seed: int) -> str:
    """The side with `please` is chosen; words and lengths are drawn alike."""
    draw = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[str]:
        return [WORDS[int(i)] for i in torch.randint(0, len(WORDS), (n,), generator=draw)]

    rows = []
    for n in range(count):
        first, second = (words(int(torch.randint(2, 9, (1,), generator=draw))) for _ in range(2))
        first[0], second[-1] = "please", "never"
        rows.append({"id": f"p{n}", "prompt": " ".join(words(3)), "chosen": " ".join(first)})
        rows[-1]["rejected"] = " ".join(second)
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def here(tmp_path_factory, shared) -> Path:
    home = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=30522, **SIZES)).save_pretrained(home / "bert")
    (home / "template.jinja").write_text(TEMPLATE)
    (home / "pairs.jsonl").write_text(pairs(256, 0))
    (home / "fresh.jsonl").write_text(pairs(64, 1))
    tokenizer = shared / "tokenizers/bert-base-uncased"
    (home / "recipe.yaml").write_text(RECIPE.format(here=home, tokenizer=tokenizer))
    return home


def train(
    here: Path, name: str, *overrides: str, resume: bool = False, stop_after: int | None = None
) -> RunDir:
    recipe = load_recipe(str(here / "recipe.yaml"), overrides).recipe
    run = RunDir(here / name)
    run.create()
    ctx = RunContext(recipe, run, 0, 1, CPU, resume, 1, lambda: None, lambda said: None)
    if stop_after is None:
        reward_model.train(ctx)
        return run
    asked = iter([None] * (stop_after - 1))
    ctx.stop_signal = lambda: next(asked, signal.SIGINT)
    with pytest.raises(Interrupted):
        reward_model.train(ctx)
    return run


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.final / "model.safetensors")


@pytest.fixture(scope="module")
def trained(here: Path) -> RunDir:
    return train(here, "whole")


def test_it_learns_and_transformers_loads_equal_scores(trained: RunDir, here: Path) -> None:
    last = json.loads(trained.metrics.read_text().splitlines()[-1])
    assert last["eval/accuracy"] >= 0.9
    assert last["eval/length_accuracy"] < 0.65
    rows = [[101, 3000, 2000, 102], [101, 2000, 102, 3531, 2314, 102], [101, 7592, 102, 2054, 102, 0]]
    plain = AutoModelForSequenceClassification.from_pretrained(trained.final).eval()
    assert plain.config.num_labels == 1
    with torch.no_grad():
        expected = [float(plain(torch.tensor([row])).logits) for row in rows]
    ours = load_reward_model(str(trained.final), torch.float32, CPU)
    assert ours.score(rows, 100) == pytest.approx(expected, abs=1e-6)
    written = json.loads((trained.final / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert "value_head_prefix" not in written


def test_it_scores_rows_as_a_source_of_a_recipe(trained: RunDir) -> None:
    from rlhfctl.recipe.sections import ModelSource

    source = ModelReward(ModelSource(kind="model", path=str(trained.final)))
    given = {"messages": [{"role": "user", "content": "river"}], "label": None, "metadata": {}}
    samples = [
        {**given, "id": str(n), "response": text} for n, text in enumerate(("please walk", "walk never"))
    ]
    good, bad = source.score(samples)
    assert good.score is not None
    assert bad.score is not None
    assert good.score > bad.score


def test_a_stop_and_a_resume_change_nothing(trained: RunDir, here: Path) -> None:
    train(here, "stopped", stop_after=11)
    resumed = train(here, "stopped", resume=True)
    expected, found = weights(trained), weights(resumed)
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_micro_batches_and_checkpointing_change_nothing_but_rounding(trained: RunDir, here: Path) -> None:
    other = train(
        here, "cut", "train.steps=5", "train.tokens_per_microbatch=64", "policy.gradient_checkpointing=true"
    )
    first, second = (run.metrics.read_text().splitlines()[1:5] for run in (trained, other))
    losses = [[json.loads(line)["loss/rm"] for line in lines] for lines in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(("config", "model"), [(BertConfig, BertModel), (RobertaConfig, RobertaModel)])
def test_padding_and_company_do_not_change_a_score(tmp_path, config, model) -> None:
    torch.manual_seed(2)
    model(config(vocab_size=53, pad_token_id=1, **SIZES)).save_pretrained(tmp_path)
    built, told = load_for_training(Policy(path=str(tmp_path)), "normal", CPU, 3)
    assert told.startswith("new: normal")
    draw = torch.Generator().manual_seed(5)
    sides = [Reading(torch.randint(3, 53, (n,), generator=draw).tolist(), [], []) for n in (5, 9, 3, 12)]
    rows = [JudgedRow("a", sides[0], sides[1], 0.0, None, []), JudgedRow("b", sides[2], None, 0.0, 1.0, [])]
    rows.append(JudgedRow("c", sides[3], sides[0], 0.0, None, []))
    scores = score_pack(built, rows, RewardModelling(), 1, CPU)
    with torch.no_grad():
        alone = {id(side): float(built(torch.tensor([side.ids])).logits) for side in sides}
    assert scores.chosen.tolist() == pytest.approx([alone[id(row.chosen)] for row in rows], abs=1e-5)
    expected = [alone[id(row.rejected)] if row.rejected else 0.0 for row in rows]
    assert scores.rejected.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in alone.values()}) == 4


def test_the_rule_of_the_head(tmp_path, trained: RunDir) -> None:
    kept, told = load_for_training(Policy(path=str(trained.final)), "auto", CPU, 0)
    assert told == "the checkpoint's classifier"
    assert torch.equal(last_linear(kept).weight, weights(trained)["classifier.weight"])
    fresh, told = load_for_training(Policy(path=str(trained.final)), "zero", CPU, 0)
    assert told == "new: zeros"
    assert not last_linear(fresh).weight.any()
    tensors = weights(trained)
    tensors["bert.encoder.layer.1.output.dense.weight"] = torch.zeros(3, 3)
    (tmp_path / "config.json").write_text((trained.final / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"bert\.encoder\.layer\.1"):
        load_for_training(Policy(path=str(tmp_path)), "auto", CPU, 0)


@pytest.mark.parametrize(
    "wrong", ["algorithm.score=token_sum", "algorithm.step_coef=0.5", "policy.lora={rank: 4}"]
)
def test_what_needs_a_decoder_is_refused(here: Path, wrong: str) -> None:
    with pytest.raises(Refused, match="encoder"):
        train(here, wrong.split(".")[1][:5], wrong)
