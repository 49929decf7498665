"""Runs over quantised weights: the loss falls, a resumed run is the whole one, final/ is what was trained."""

import importlib
import json
import shutil
import signal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhfctl.errors import Interrupted, Refused
from rlhfctl.models.load import backbone, hidden_at_predictors, load_causal_lm
from rlhfctl.models.packing import pack
from rlhfctl.models.value_model import load_value_model
from rlhfctl.recipe.sections import Policy
from rlhfctl.recipe.tasks import TASKS
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers.context import RunContext
from rlhfctl.worker import TRAINERS

CPU = torch.device("cpu")
REWARD = """\
def score(samples):
    return [float(len(sample["response"]) % 2) for sample in samples]
"""
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def base(chains, tmp_path_factory):
    """The quickstart's model with random weights, as a checkpoint."""
    directory = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(chains / "model", directory)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(chains / "model")).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def recipes(chains, base, tmp_path_factory):
    """recipes(task, kind): over the same base, four steps."""
    place = tmp_path_factory.mktemp("data")
    (place / "reward.py").write_text(REWARD)
    prompts = [json.loads(line) for line in (chains / "data/prompts.jsonl").read_text().splitlines()[:24]]
    trajectories = [
        {"prompt": row["question"], "response": f"1+1=2\n#{i % 10}", "reward": float(i % 2)}
        for i, row in enumerate(prompts)
    ]
    pairs = [
        {"prompt": row["question"], "chosen": f"#{i % 10}", "rejected": f"#{(i + 1) % 10}"}
        for i, row in enumerate(prompts)
    ]
    for name, rows in (("trajectories", trajectories), ("pairs", pairs)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {
        "sft": str(chains / "data/sft.jsonl"),
        "rm": str(place / "pairs.jsonl"),
        "ppo": str(chains / "data/prompts.jsonl"),
        "oreo": str(place / "trajectories.jsonl"),
    }

    def build(task, kind):
        recipe = {
            "task": task,
            "name": "tiny",
            "policy": {"path": str(base), "quantization": kind, "lora": LORA},
            "data": {"train": [{"path": train[task]}], "max_length": 64},
            "optim": {"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0},
            "train": {"steps": 4, "batch_size": 8, "tokens_per_microbatch": 256},
        }
        if task == "ppo":
            recipe |= {
                "reward": {"sources": [{"kind": "python", "path": str(place / "reward.py")}]},
                "rollout": {"max_new_tokens": 6},
                "value_model": {"lora": {"rank": 2}},
                "algorithm": {"kl_coef": 0.05},
            }
        if task == "oreo":
            recipe |= {"value_model": {"lora": {"rank": 2}}, "algorithm": {"value_warmup_steps": 1}}
        return recipe

    return build


def run(recipe, directory, resume=False, stop_after=None):
    """Its records without times."""
    parsed = TASKS[recipe["task"]].model_validate(recipe)
    run_dir = RunDir(directory)
    run_dir.create()
    asked = iter([None] * (stop_after - 1)) if stop_after else None
    stop = (lambda: next(asked, signal.SIGINT)) if asked else (lambda: None)
    ctx = RunContext(parsed, run_dir, 0, 1, CPU, resume, 1, stop, lambda line: None)
    trainer = importlib.import_module(TRAINERS[recipe["task"]])
    if stop_after:
        with pytest.raises(Interrupted):
            trainer.train(ctx)
    else:
        trainer.train(ctx)
    volatile = ("seconds/", "memory/", "tokens_per_second")
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(volatile)} for record in records]


@pytest.mark.parametrize(("task", "kind"), [("sft", "nf4"), ("rm", "int8"), ("ppo", "int8"), ("oreo", "fp4")])
def test_a_stopped_and_resumed_run_is_the_whole_run(task, kind, recipes, tmp_path):
    whole = run(recipes(task, kind), tmp_path / "whole")
    run(recipes(task, kind), tmp_path / "parts", stop_after=2)
    parts = run(recipes(task, kind), tmp_path / "parts", resume=True)
    assert parts == whole
    assert len(whole) == 4
    for name in ("final", *(["value_model"] if task == "oreo" else [])):
        files = sorted((tmp_path / "whole" / name).glob("*.safetensors"))
        assert files
        for file in files:
            assert file.read_bytes() == (tmp_path / "parts" / name / file.name).read_bytes()
    saved = sum(
        file.stat().st_size for file in (tmp_path / "parts/checkpoints/step_000002").rglob("*.safetensors")
    )
    assert saved < 400_000  # adapters, head and moments; the model alone is 650,000 bytes
    if task == "oreo":
        assert whole[0]["kl/exact"] == 0
        assert whole[3]["kl/exact"] > 0
        function = load_value_model(tmp_path / "whole/value_model", torch.float32, CPU)
        assert function.facts["level"] == "token"
        assert any(float(value) for value in function.at([[1, 5, 3, 9]], [[1, 3]], 64)[0])


def test_the_loss_falls_and_final_is_whole_or_the_adapter_alone(recipes, base, tmp_path):
    recipe = recipes("sft", "nf4")
    recipe["train"]["steps"] = 30
    records = run(recipe, tmp_path / "merged")
    assert records[-1]["loss/sft"] < 0.9 * records[0]["loss/sft"]
    recipe["policy"]["lora"] = LORA | {"merge_final": False}
    assert run(recipe, tmp_path / "adapter") == records

    merged = load_causal_lm(Policy(path=str(tmp_path / "merged/final")), CPU, 0)
    adapted = load_causal_lm(Policy(path=str(tmp_path / "adapter/final")), CPU, 0)
    batch = pack([0], [[3, 1, 4, 1, 5, 9, 2, 6]], [range(1, 8)])
    with torch.no_grad():
        one, two = (hidden_at_predictors(backbone(model), batch) for model in (merged, adapted))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "merged/final/adapter_config.json").exists()
    facts = json.loads((tmp_path / "adapter/final/adapter_base.json").read_text())
    assert (facts["path"], facts["quantization"], facts["quantization_block"]) == (str(base), "nf4", 64)


def test_a_base_that_changed_between_the_attempts_is_refused(recipes, base, tmp_path):
    own = tmp_path / "model"
    shutil.copytree(base, own)
    recipe = recipes("sft", "nf4")
    recipe["policy"]["path"] = str(own)
    run(recipe, tmp_path / "run", stop_after=2)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(own)).save_pretrained(own)
    with pytest.raises(Refused, match="trained on other base weights"):
        run(recipe, tmp_path / "run", resume=True)
