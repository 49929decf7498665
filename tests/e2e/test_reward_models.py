"""`rlhfctl rm` from the command line: every objective, adapters, number formats; what it saves scores as it should."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhfctl.errors import Refused
from rlhfctl.models.reward_model import load_reward_model
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.rewards.model import ModelReward


def rm(cli, chains, run, *overrides, train="pairs", held_out="pairs_eval", start=None, check=True):
    """A short run; its records."""
    model = chains / "model"
    recipe = {
        "task": "rm",
        "name": "x",
        "policy": {"path": str(start)} if start else {"from_config": str(model), "tokenizer": str(model)},
        "data": {
            "train": [{"path": str(chains / "data" / f"{train}.jsonl")}],
            "eval": [{"path": str(chains / "data" / f"{held_out}.jsonl")}],
            "max_length": 64,
        },
        "optim": {"lr": 3e-3},
        "train": {"steps": 4, "batch_size": 32},
        "launch": {"threads": 1},
    }
    path = run.parent / f"{run.name}.json"  # JSON is YAML
    path.write_text(json.dumps(recipe))
    done = cli("rm", str(path), "--run-dir", str(run), *overrides, cwd=run.parent, check=check)
    if not check:
        return done
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("rm")


@pytest.fixture(scope="module")
def trained(cli, chains, workdir):
    """(run directory, records) of a run on pairs."""
    return workdir / "pairs", rm(cli, chains, workdir / "pairs", "algorithm.center_coef=0.01")


def samples(chains, count=20):
    rows = [json.loads(line) for line in (chains / "data/pairs_eval.jsonl").read_text().splitlines()[:count]]
    return [
        {"id": row["id"], "messages": [{"role": "user", "content": row["prompt"]}], "response": row[side]}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def test_pairs(trained, chains):
    run, records = trained
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    first, last = records[0], records[-1]
    assert first["eval/accuracy"] == first["eval/length_accuracy"] == 0.5
    assert first["eval/loss"] == pytest.approx(0.693147181)
    assert last["eval/score_std"] > 0
    assert {"eval/margin", "eval/calibration_error", "rm/accuracy", "rm/margin", "rm/score_mean"} <= set(last)
    config = json.loads((run / "final/config.json").read_text())
    assert config["mean"] == pytest.approx(last["eval/score_mean"], rel=1e-6)
    assert config["std"] == pytest.approx(last["eval/score_std"], rel=1e-6)


def test_a_reward_source_gives_the_scores_that_transformers_gives(trained, chains):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = trained[0] / "final"
    outcomes = ModelReward(ModelSource(kind="model", path=str(path))).score(samples(chains))
    plain, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [
        tokenizer.apply_chat_template(
            [*sample["messages"], {"role": "assistant", "content": sample["response"]}], tokenize=False
        )
        for sample in samples(chains)
    ]
    encoded = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        theirs = plain.eval()(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).logits[:, 0]
    assert [outcome.score for outcome in outcomes] == pytest.approx(theirs.tolist(), abs=1e-5)
    assert len({round(score, 6) for score in theirs.tolist()}) > 10


@pytest.mark.heavy
def test_an_adapter_in_bfloat16_with_recomputed_activations(cli, chains, trained, workdir):
    records = rm(
        cli,
        chains,
        workdir / "adapter",
        "policy.lora={rank: 4, merge_final: false}",
        "policy.dtype=bfloat16",
        "policy.gradient_checkpointing=true",
        start=trained[0] / "final",
    )
    assert records[0]["eval/loss"] == pytest.approx(
        trained[1][-1]["eval/loss"], abs=0.02
    )  # it goes on from there
    path = workdir / "adapter/final"
    base = load_file(trained[0] / "final/model.safetensors")["score.weight"]
    head = load_file(path / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert 0 < float((head - base).abs().max()) < 0.1
    scores = [
        outcome.score
        for outcome in ModelReward(ModelSource(kind="model", path=str(path))).score(samples(chains))
    ]
    mean = torch.tensor(scores).mean().item()
    assert mean == pytest.approx(
        records[-1]["eval/score_mean"], abs=0.5 * records[-1]["eval/score_std"] + 0.05
    )


def test_token_sums_with_step_labels_beside_pairs(cli, chains, workdir):
    steps = chains / "data/steps.jsonl"
    pairs = chains / "data/pairs.jsonl"
    records = rm(
        cli,
        chains,
        workdir / "sums",
        "algorithm.score=token_sum",
        "algorithm.step_coef=1.0",
        f"data.train=[{{path: {pairs}}}, {{path: {steps}}}]",
    )
    assert records[-1]["loss/rm_step"] > 0
    assert {"rm/step_accuracy", "eval/accuracy"} <= set(records[-1])
    source = ModelReward(ModelSource(kind="model", path=str(workdir / "sums/final")))
    assert source.model.read == "token_sum"
    outcomes = source.score(samples(chains, 400))
    chosen, rejected = [o.score for o in outcomes[::2]], [o.score for o in outcomes[1::2]]
    right = [(c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)]
    # Scored anew from the messages, the pairs of data.eval are told apart as the trainer told them apart.
    assert sum(right) / len(right) == pytest.approx(records[-1]["eval/accuracy"], abs=1e-9)
    assert torch.tensor(chosen + rejected).mean().item() == pytest.approx(
        records[-1]["eval/score_mean"], abs=1e-4
    )


def test_steps_alone(cli, chains, workdir):
    records = rm(cli, chains, workdir / "steps", "algorithm.objective=step", train="steps", held_out="steps")
    last = records[-1]
    assert last["eval/accuracy"] == last["eval/step_accuracy"]
    assert 0 <= last["eval/first_wrong_step"] <= 1
    assert last["eval/loss"] < records[0]["eval/loss"]
    source = ModelReward(ModelSource(kind="model", path=str(workdir / "steps/final")))
    assert source.model.read == "step_end"
    (outcome,) = source.score([samples(chains)[0]])
    assert outcome.status == "ok"


def test_right_and_wrong_answers(cli, chains, workdir):
    rows = [json.loads(line) for line in (chains / "data/steps.jsonl").read_text().splitlines()]
    path = workdir / "answers.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": row["prompt"], "steps": row["completions"], "reward": row["right"]}) + "\n"
            for row in rows
        )
    )
    source = f"[{{path: {path}}}]"
    records = rm(
        cli,
        chains,
        workdir / "outcome",
        "algorithm.objective=outcome",
        f"data.train={source}",
        f"data.eval={source}",
    )
    last = records[-1]
    assert {"eval/auc", "eval/length_auc", "eval/calibration_error", "rm/accuracy"} <= set(last)
    assert last["eval/loss"] < records[0]["eval/loss"]
    assert "rm/margin" not in last


def test_mistakes_start_nothing(cli, chains, workdir):
    wrong = rm(cli, chains, workdir / "no-pairs", train="steps", check=False)
    assert wrong.returncode == 5
    assert "none of 400 rows is left" in wrong.stderr
    ordinary = rm(cli, chains, workdir / "sft-rows", train="sft", check=False)
    assert ordinary.returncode == 5
    assert "no format with a judgement fits the columns id, prompt, response" in ordinary.stderr
    ignored = rm(cli, chains, workdir / "ignored", "algorithm.outcome_threshold=0.1", check=False)
    assert ignored.returncode == 2
    assert "outcome_threshold is ignored here" in ignored.stderr
    command = cli("sft", str(workdir / "pairs.json"), cwd=workdir, check=False)
    assert (command.returncode, "run `rlhfctl rm" in command.stderr) == (2, True)
    for done in (wrong, ordinary, ignored, command):
        assert "Traceback" not in done.stderr
    assert not any(Path(workdir / name / "metrics.jsonl").exists() for name in ("no-pairs", "sft-rows"))


def test_a_policy_is_not_a_reward_model(chains, trained, tmp_path):
    """What was trained is taken as a reward; the same directory without its head is refused."""
    from safetensors.torch import save_file

    source = trained[0] / "final"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors.pop("score.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"holds no reward head: looked for score\.weight"):
        load_reward_model(str(tmp_path), torch.float32, torch.device("cpu"))
