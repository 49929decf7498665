"""What `tracking` asks of the machine: its packages, and a key where W&B is online."""

import importlib.util
from pathlib import Path

import pytest

from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.machine import package_findings, tracking_findings
from rlhfctl.recipe.load import load_recipe


def inputs(*overrides: str) -> Inputs:
    return Inputs(load_recipe("quickstart/sft", overrides).recipe, None, True)


@pytest.fixture(autouse=True)
def a_machine_without_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    (found,) = package_findings(inputs("tracking.wandb.project=p"))
    assert (found.id, found.exit_code, found.evidence["missing"]) == ("X001", 4, ["wandb"])
    assert found.fix == "pip install 'rlhfctl[tracking]'"
    assert package_findings(inputs()) == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert package_findings(inputs("tracking.wandb.project=p")) == []


def test_online_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = inputs("tracking.wandb.project=p")
    (found,) = tracking_findings(online)
    assert (found.id, found.severity, found.exit_code) == ("X020", "error", 4)
    assert "tracking.wandb.mode: offline" in found.fix
    assert tracking_findings(inputs("tracking.wandb.project=p", "tracking.wandb.mode=offline")) == []
    assert tracking_findings(inputs()) == []
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert tracking_findings(online) == []
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.example login user password x\n")
    assert tracking_findings(online) == []
