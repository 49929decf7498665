"""The files that a run learns from: which they are, and that a resumed run goes on with the same."""

import hashlib
from pathlib import Path

import pytest

from rlhfctl.errors import UsageError
from rlhfctl.launch.inputs import hashes, refuse_other_inputs
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
    refuse_other_inputs(run, before, hashes(recipe))
    data.write_text('{"prompt": "1?", "response": "3"}\n')
    with pytest.raises(UsageError) as told:
        refuse_other_inputs(run, before, hashes(recipe))
    assert told.value.message.startswith(f"{data} changed since the run in '{run.path}' was last started: ")
    refuse_other_inputs(run, {}, hashes(recipe))  # of an older version that kept none


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
