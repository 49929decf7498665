"""The files that a run learns from: which they are, and that a resumed run goes on with the same."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhfctl.errors import UsageError
from rlhfctl.launch.inputs import hashes, models, refuse_other_inputs
from rlhfctl.launch.plan import make_plan
from rlhfctl.launch.run import open_attempt
from rlhfctl.preflight.devices import this_machine
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir

RECIPE = """\
task: sft
name: inputs
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data: {{train: [{{path: {data}}}, {{path: some/hub-data}}], eval: [{{path: {chains}/data/eval.jsonl}}]}}
train: {{steps: 2}}
"""


def test_data_configuration_and_tokenizer_are_held(chains: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "1?", "response": "2"}\n')
    (tmp_path / "r.yaml").write_text(RECIPE.format(chains=chains, data=data))
    recipe = load_recipe(str(tmp_path / "r.yaml")).recipe
    before, run = hashes(recipe), RunDir(tmp_path / "a run")
    assert before[str(data)] == hashlib.sha256(data.read_bytes()).hexdigest()
    model = ("config.json", "tokenizer.json", "tokenizer_config.json")
    assert set(before) == {
        str(data),
        str(chains / "data/eval.jsonl"),
        *(str(chains / "model" / name) for name in model),
    }
    refuse_other_inputs(recipe, run, before, hashes(recipe))
    data.write_text('{"prompt": "1?", "response": "3"}\n')
    with pytest.raises(UsageError) as told:
        refuse_other_inputs(recipe, run, before, hashes(recipe))
    assert told.value.message.startswith(f"{data} changed since the run in '{run.path}' was last started: ")
    refuse_other_inputs(recipe, run, {}, hashes(recipe))  # of an older version that kept none


PPO = """\
task: ppo
name: inputs
policy: {{path: {policy}}}
value_model: {{init: {value}, lora: {{rank: 2}}}}
reward: {{sources: [{{kind: model, path: {rm}}}, {{kind: python, path: {function}}}]}}
algorithm: {{kl_coef: {kl}}}
data: {{train: [{{path: {chains}/data/prompts.jsonl, format: qa}}]}}
train: {{steps: 2}}
"""


def write_weights(directory: Path, value: float) -> None:
    directory.mkdir(exist_ok=True)
    save_file({"layer.weight": torch.full((4, 4), value)}, directory / "model.safetensors")


def test_models_that_stand_still_are_held(chains: Path, tmp_path: Path) -> None:
    names = ("policy", "value", "rm")
    for name in names:
        write_weights(tmp_path / name, 1.0)
    function = tmp_path / "rewards.py"
    function.write_text("def score(samples): return [0.0 for _ in samples]\n")
    places = {name: tmp_path / name for name in names} | {"chains": chains, "function": function}
    (tmp_path / "r.yaml").write_text(PPO.format(kl=0.1, **places))
    recipe, run = load_recipe(str(tmp_path / "r.yaml")).recipe, RunDir(tmp_path / "run")
    before = hashes(recipe)
    for name in names:
        write_weights(tmp_path / name, 1.5)
        with pytest.raises(UsageError, match=f"^{tmp_path / name} changed since the run"):
            refuse_other_inputs(recipe, run, before, hashes(recipe))
        write_weights(tmp_path / name, 1.0)  # what counts is what lies there
    assert refuse_other_inputs(recipe, run, before, hashes(recipe)) == []

    function.write_text("def score(samples): return [1.0 for _ in samples]\n")
    assert refuse_other_inputs(recipe, run, before, hashes(recipe)) == [str(function)]

    # Without a KL the policy's start is read from the checkpoint alone.
    (tmp_path / "r.yaml").write_text(PPO.format(kl=0, **places))
    assert set(models(load_recipe(str(tmp_path / "r.yaml")).recipe)) == {
        str(tmp_path / "value"),
        str(tmp_path / "rm"),
    }


def test_the_prompts_of_a_value_fit_are_held(chains: Path) -> None:
    prompts = f"{chains}/data/prompts.jsonl"
    recipe = load_recipe("quickstart/oreo-rounds", [f"value_fit.prompts=[{{path: {prompts}}}]"]).recipe
    assert prompts in hashes(recipe)


def test_a_resume_with_other_data_starts_nothing(chains: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "1?", "response": "2"}\n')
    (tmp_path / "r.yaml").write_text(RECIPE.format(chains=chains, data=data))
    recipe, machine = load_recipe(str(tmp_path / "r.yaml")).recipe, this_machine()
    run, plan = RunDir(tmp_path / "run"), make_plan(recipe.launch, machine, {})
    run.create()
    assert open_attempt(recipe, plan, machine, run, False, []) == 1
    data.write_text('{"prompt": "1?", "response": "3"}\n')
    before = sorted(str(each) for each in run.path.rglob("*"))
    with pytest.raises(UsageError, match=r"d\.jsonl changed since the run"):
        open_attempt(recipe, plan, machine, run, True, [])
    assert sorted(str(each) for each in run.path.rglob("*")) == before
    data.write_text('{"prompt": "1?", "response": "2"}\n')
    assert open_attempt(recipe, plan, machine, run, True, []) == 2
