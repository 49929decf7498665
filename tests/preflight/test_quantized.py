"""Quantised weights before launch: what cannot be quantised, what is missing, what no longer fits."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from rlhfctl.base_weights import base_facts
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.run import run_preflight
from rlhfctl.recipe.tasks import TASKS

POLICY = {"path": "m", "quantization": "nf4", "lora": {"rank": 4}}
VERIFIER = {"kind": "verifier", "name": "chain_answer"}


def recipe(task: str, policy: dict[str, Any], **keys: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "task": task,
        "name": "toy",
        "policy": policy,
        "data": {"train": [{"path": "d.jsonl"}]},
        "train": {"steps": 4, "batch_size": 8},
    }
    if task in ("ppo", "reft"):
        sections["reward"] = {"sources": [VERIFIER]}
    if task == "reft":
        sections["warmup"] = {"epochs": 1}
    return sections | keys


def problems(parsed: Any, run_dir: Path | None = None) -> dict[str, Finding]:
    report = run_preflight(SimpleNamespace(recipe=parsed), run_dir=run_dir, quick=True)  # type: ignore[arg-type]
    return {finding.id: finding for finding in report.findings if finding.severity == "error"}


@pytest.fixture
def stories(shared: Path, tmp_path: Path) -> Path:
    """A real checkpoint: 64 columns, and 172 in the down projection."""
    return Path(shutil.copytree(shared / "models/stories260k", tmp_path / "model"))


def sft(model: Path, tmp_path: Path, **policy: Any) -> Any:
    data = tmp_path / "data.jsonl"
    row = {
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom and Lily."}]
    }
    data.write_text("".join(json.dumps(row | {"id": str(index)}) + "\n" for index in range(8)))
    values = recipe("sft", {**POLICY, "path": str(model), **policy}, data={"train": [{"path": str(data)}]})
    return TASKS["sft"].model_validate(values)


@pytest.mark.parametrize(
    ("task", "policy", "keys", "words"),
    [
        ("sft", {"path": "m", "quantization": "nf4"}, {}, "with a section policy.lora"),
        ("rm", {"path": "m", "quantization": "int8"}, {}, "with a section policy.lora"),
        ("ppo", POLICY, {}, "with a section value_model.lora"),
        ("oreo", POLICY, {}, "with a section value_model.lora"),
        (
            "sft",
            {"from_config": "m", "tokenizer": "m", "quantization": "nf4", "lora": {}},
            {},
            "policy.quantization needs policy.path",
        ),
        (
            "sft",
            {**POLICY, "quantization": "int8", "quantization_block": 32},
            {},
            "quantization_block is ignored",
        ),
        (
            "ppo",
            POLICY,
            {"value_model": {"shared_trunk": True, "lora": {}}},
            "value_model.lora is an adapter of the value model",
        ),
    ],
)
def test_a_recipe_that_would_train_quantised_weights_is_an_error(
    task: str, policy: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        TASKS[task].model_validate(recipe(task, policy, **keys))


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("sft", {}),
        ("rm", {}),
        ("reft", {}),
        ("ppo", {"value_model": {"lora": {}}}),
        ("ppo", {"algorithm": {"advantage": "grpo"}, "rollout": {"n": 2}}),
        ("oreo", {"value_model": {"lora": {}}}),
    ],
)
def test_every_task_takes_quantised_weights_under_an_adapter(task: str, keys: dict[str, Any]) -> None:
    parsed = TASKS[task].model_validate(recipe(task, POLICY, **keys))
    again = TASKS[task].model_validate(parsed.model_dump())
    assert again.policy.quantization == "nf4"


def test_a_block_that_does_not_divide_the_columns(stories: Path, tmp_path: Path) -> None:
    found = problems(sft(stories, tmp_path))["W021"]
    assert "does not divide the 172 columns of" in found.title
    assert "down_proj" in found.title
    assert found.exit_code == 5
    assert not [id for id in problems(sft(stories, tmp_path, quantization="int8")) if id.startswith("W02")]


def test_a_checkpoint_that_is_quantised_already(stories: Path, tmp_path: Path) -> None:
    config = json.loads((stories / "config.json").read_text())
    (stories / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    assert "quantised already" in problems(sft(stories, tmp_path))["W020"].title


def quantised(model: Path, **keys: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"} | keys})
    )


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_what_is_quantised_already_is_not_trained_in_part(lora: Any, stories: Path, tmp_path: Path) -> None:
    """Norms and embeddings alone would take a gradient, and the end of the run could not be saved."""
    quantised(stories, load_in_4bit=True)
    found = problems(sft(stories, tmp_path, quantization="none", lora=lora))["W020"]
    assert (found.exit_code, found.title) == (5, f"policy.path: {stories} is quantised already")
    assert "matrices take no gradient" in found.detail


def test_weights_that_are_rounded_in_every_pass_are_whole(stories: Path, tmp_path: Path) -> None:
    quantised(stories, quant_method="bitnet", quantization_mode="online")
    assert "W020" not in problems(sft(stories, tmp_path, quantization="none", lora=None))


def test_a_value_model_that_is_quantised_already(stories: Path, shared: Path, tmp_path: Path) -> None:
    quantised(stories)
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    keys = {
        "value_model": {"init": str(stories)},
        "data": {"train": [{"path": str(tmp_path / "data.jsonl")}]},
    }
    given = recipe("ppo", {"path": str(shared / "models/stories260k")}, **keys)
    found = problems(TASKS["ppo"].model_validate(given))["W020"]
    assert found.title == f"value_model.init: {stories} is quantised already"


def test_an_adapter_is_no_model_to_start_from(stories: Path, tmp_path: Path) -> None:
    (stories / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    found = problems(sft(stories, tmp_path, quantization="none"))["W022"]
    assert (found.exit_code, "merged" in found.fix) == (5, True)


def test_a_resumed_run_whose_base_has_changed(stories: Path, tmp_path: Path) -> None:
    state = tmp_path / "run/checkpoints/step_000002/trainer.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"step": 2, "base": base_facts(str(stories), "int8", 64)}))
    parsed = sft(stories, tmp_path, quantization="int8")
    assert "W023" not in problems(parsed, tmp_path / "run")
    weights = stories / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert "trained on other base weights" in problems(parsed, tmp_path / "run")["W023"].detail

    # The second phase of a run stands on the first one's model.
    warm = tmp_path / "run/warmup"
    shutil.copytree(stories, warm)
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([raw[-1] ^ 3]))
    state.write_text(json.dumps({"step": 4, "base": base_facts(str(warm), "int8", 64)}))
    assert "W023" not in problems(parsed, tmp_path / "run")


def test_a_machine_without_bitsandbytes(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    absent = {"bitsandbytes"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    found = problems(sft(stories, tmp_path, quantization="int8"))["X001"]
    assert found.evidence["missing"] == ["bitsandbytes"]
    assert (found.fix, found.exit_code) == ("pip install 'rlhfctl[quant]'", 4)


def test_memory_counts_the_bits_that_are_kept(stories: Path, tmp_path: Path) -> None:
    def memory(kind: str) -> int:
        parsed = sft(stories, tmp_path, quantization=kind, quantization_block=64)
        report = run_preflight(SimpleNamespace(recipe=parsed), quick=True)  # type: ignore[arg-type]
        return next(finding.evidence["memory"] for finding in report.findings if finding.id == "X009")

    # 5 layers of q, o [64, 64], k, v [32, 64], gate, up [172, 64], down [64, 172]; float32 on a CPU.
    weights = 5 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 172 * 64)
    assert memory("none") - memory("int8") == 3 * weights
    assert memory("none") - memory("nf4") == int(3.4375 * weights)
