"""What rollout.engine vllm asks of the machine."""

import importlib.util
import json
from pathlib import Path

import pytest

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.machine import engine_findings, package_findings
from rlhfctl.recipe.tasks import PpoRecipe


def inputs(chains: Path, model: Path, engine: str = "vllm") -> Inputs:
    recipe = PpoRecipe.model_validate(
        {
            "task": "ppo",
            "name": "toy",
            "policy": {"from_config": str(model), "tokenizer": str(chains / "model")},
            "data": {"train": [{"path": str(chains / "data/prompts.jsonl")}]},
            "reward": {"sources": [{"kind": "verifier", "name": "chain_answer"}]},
            "rollout": {"engine": engine},
            "train": {"steps": 4, "batch_size": 8},
        }
    )
    return Inputs(recipe, None, True)


def sized(chains: Path, out: Path, heads: int) -> Path:
    config = json.loads((chains / "model/config.json").read_text())
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_missing_vllm_is_named_with_its_install_line(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    found: list[Finding] = package_findings(inputs(chains, chains / "model"))
    assert [finding.exit_code for finding in found] == [4]
    assert "rollout.engine vllm" in str(found[0].detail)
    assert "rlhfctl[vllm]" in found[0].fix
    assert "make install-full" in found[0].fix
    assert package_findings(inputs(chains, chains / "model", "hf")) == []


def test_head_sizes_on_a_cpu(chains: Path, tmp_path: Path) -> None:
    found = engine_findings(inputs(chains, sized(chains, tmp_path, 4)))
    assert [(finding.id, finding.exit_code) for finding in found] == [("X010", 4)]
    assert "size 16" in found[0].title
    assert engine_findings(inputs(chains, sized(chains, tmp_path, 2))) == []
    assert engine_findings(inputs(chains, chains / "model", "hf")) == []
