"""W024: what is fed the policy's token ids has its words, and a row for each of them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.run import run_preflight
from rlhfctl.recipe.tasks import TASKS

GRPO = {"algorithm": {"advantage": "grpo"}, "rollout": {"n": 2}}
PRIME = {"algorithm": {"advantage": "prime", "kl_coef": 0.0}, "rollout": {"n": 2}}


def told(task: str, tmp_path: Path, policy: dict[str, Any], **keys: Any) -> list[Finding]:
    rows = {"question": "What is 2 + 3?", "answer": "5"}, {"question": "What is 1 + 3?", "answer": "4"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "task": task,
        "name": "toy",
        "policy": policy,
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl"), "format": "qa"}], "max_length": 128},
        "train": {"steps": 4, "batch_size": 8},
    }
    if task != "sft":
        given["reward"] = {"sources": [{"kind": "verifier", "name": "math_answer"}]}
    if task == "reft":
        given["warmup"] = {"epochs": 1}
    parsed = TASKS[task].model_validate(given | keys)
    report = run_preflight(SimpleNamespace(recipe=parsed), quick=True)  # type: ignore[arg-type]
    return [finding for finding in report.findings if finding.id == "W024"]


@pytest.fixture
def other(shared: Path) -> str:
    return str(shared / "models/stories260k")


@pytest.mark.parametrize(
    ("task", "keys", "key"),
    [
        ("ppo", {"reference": "OTHER"}, "reference"),
        ("ppo", {"reference": "OTHER"} | GRPO, "reference"),
        ("ppo", {"value_model": {"init": "OTHER", "head": "zero"}}, "value_model.init"),
        ("ppo", {"implicit_prm": {"path": "OTHER"}} | PRIME, "implicit_prm.path"),
        ("reft", {"value_model": {"init": "OTHER", "head": "zero"}}, "value_model.init"),
    ],
)
def test_models_that_would_read_other_words(
    task: str, keys: dict[str, Any], key: str, other: str, shared: Path, tmp_path: Path
) -> None:
    given = json.loads(json.dumps(keys).replace("OTHER", other))
    (found,) = told(task, tmp_path, {"path": str(shared / "models/babyllama-361")}, **given)
    assert (found.severity, found.exit_code) == ("error", 5)
    assert found.title == f"{key}: {other} has another vocabulary than the policy"
    same = json.loads(json.dumps(keys).replace("OTHER", str(shared / "models/babyllama-361")))
    assert not told(task, tmp_path, {"path": str(shared / "models/babyllama-361")}, **same)


def test_a_value_model_from_the_reward_model_of_another_family(
    other: str, shared: Path, tmp_path: Path
) -> None:
    keys = {
        "value_model": {"init": "reward_model", "head": "zero"},
        "reward": {"sources": [{"kind": "model", "path": other}]},
    }
    (found,) = told("ppo", tmp_path, {"path": str(shared / "models/babyllama-361")}, **keys)
    assert found.title.startswith(f"value_model.init: {other} has another vocabulary")


def test_with_a_shared_trunk_a_head_is_all_that_is_read(other: str, shared: Path, tmp_path: Path) -> None:
    keys = {"value_model": {"init": other, "shared_trunk": True, "head": "zero"}}
    assert not told("ppo", tmp_path, {"path": str(shared / "models/babyllama-361")}, **keys)


def test_a_tokenizer_of_another_model(other: str, shared: Path, tmp_path: Path) -> None:
    """All of its ids have a row: it would be trained on other words."""
    policy = {"path": other, "tokenizer": str(shared / "models/babyllama-361")}
    (found,) = told("sft", tmp_path, policy)
    assert found.title == f"policy.path: {other} has another vocabulary than policy.tokenizer"
    assert "leave policy.tokenizer out" in found.fix
    assert not told("sft", tmp_path, {"path": other, "tokenizer": other})


def test_added_tokens_may_be_others(other: str, shared: Path, tmp_path: Path) -> None:
    """As of a finetune that renamed a reserved token, or added one where the embedding has room."""
    base = Path(shutil.copytree(other, tmp_path / "base"))
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if each["id"] != 1]
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 1, "content": "<renamed>"})
    file.write_text(json.dumps(tokenizer))
    assert not told("ppo", tmp_path, {"path": other}, reference=str(base), **GRPO)


def test_ids_without_a_row(other: str, shared: Path, tmp_path: Path) -> None:
    """A policy that got new tokens, against the model that it was made from."""
    grown = Path(shutil.copytree(other, tmp_path / "grown"))
    file = grown / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 512, "content": "<new>"})
    file.write_text(json.dumps(tokenizer))
    (found,) = told("ppo", tmp_path, {"path": str(grown)}, reference=other, **GRPO)
    assert found.detail == "the policy's ids go up to 512, its embedding has 512 rows"
