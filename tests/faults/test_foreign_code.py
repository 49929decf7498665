"""Nothing that is read can run code: no pickle in the source or in a checkpoint, a model's python only on request."""

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhfctl.errors import Refused
from rlhfctl.models.load import load_causal_lm, safe_weights
from rlhfctl.preflight.run import run_preflight
from rlhfctl.recipe.load import load_recipe

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Loads of model weights that would take a pickle where there is nothing else.
LOADS = {"AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"}


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in MODULES)  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keys = {key.arg: ast.unparse(key.value) for key in node.keywords}
        if called in ("torch.load", "load_state_dict_from_url") and keys.get("weights_only") != "True":
            yield node.lineno, called
        if "numpy" in called.split(".") or called in ("np.load", "numpy.load"):
            yield from ((node.lineno, called) for key in keys if key == "allow_pickle")
        owner, _, method = called.rpartition(".")
        if method == "from_pretrained" and owner in LOADS and keys.get("use_safetensors") != "True":
            yield node.lineno, called


def test_the_source_loads_no_pickle(repo: Path) -> None:
    found = [
        f"{path.relative_to(repo)}:{line}: {name}"
        for folder in ("rlhfctl", "recipes", "benchmarks")
        for path in sorted((repo / folder).rglob("*.py"))
        for line, name in unsafe(ast.parse(path.read_text()))
    ]
    assert found == []


UNSAFE = """
import pickle
from joblib import load
torch.load(p)
torch.load(p, weights_only=False)
np.load(p, allow_pickle=True)
AutoModel.from_pretrained(p)
"""


@pytest.mark.parametrize("line", UNSAFE.strip().splitlines())
def test_that_test_can_fail(line: str) -> None:
    assert list(unsafe(ast.parse(line)))


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickled_checkpoint_is_refused_and_never_opened(chains: Path, tmp_path: Path) -> None:
    model, mark = tmp_path / "model", tmp_path / "it ran".replace(" ", "-")
    model.mkdir()
    for file in (chains / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    keys = [f"policy={{path: {model}}}", f"data.train=[{{path: {chains}/data/sft.jsonl}}]"]
    keys += ["data.eval=[]", "reward=null", "rollout=null"]
    command = [sys.executable, "-m", "rlhfctl", "sft", "quickstart/sft", "-q", *keys]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert f"policy.path: {model} holds its weights as pickles alone" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(
        Refused, match="as pickles alone"
    ):  # what eval, serve-rm and the trainers load through
        safe_weights(str(model))
    assert not mark.exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())  # the file is a working trap
    assert mark.exists()


MINE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path('{mark}').touch()
class MyConfig(LlamaConfig):
    pass
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_beside_a_model_runs_only_where_the_recipe_says_so(chains: Path, tmp_path: Path) -> None:
    model, mark = tmp_path / "model", tmp_path / "it-ran"
    model.mkdir()
    for file in (chains / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(MINE.format(mark=mark))
    keys = [
        f"policy={{from_config: {model}, tokenizer: {model}}}",
        "data.eval=[]",
        "reward=null",
        "rollout=null",
    ]
    keys.append(f"data.train=[{{path: {chains}/data/sft.jsonl}}]")
    recipe = load_recipe("quickstart/sft", keys).recipe
    assert recipe.policy.trust_remote_code is False
    load_causal_lm(recipe.policy, torch.device("cpu"), 0)
    assert not mark.exists()

    loaded = load_recipe("quickstart/sft", [*keys, "policy.trust_remote_code=true"])
    named = [finding for finding in run_preflight(loaded).findings if finding.id == "W012"]
    assert [finding.severity for finding in named] == ["warning"]
    assert f"python code that comes with {model} will run" in named[0].title
    assert not mark.exists()  # told before anything of it runs
    load_causal_lm(loaded.recipe.policy, torch.device("cpu"), 0)
    assert mark.exists()
