"""Findings and recipe errors as SARIF: from the command's own reports, with places, levels and what is handled."""

import json
import signal
from pathlib import Path

import pytest

from rlhfctl.cli.main import run
from rlhfctl.preflight.sarif import main

RECIPE = "extends: quickstart/sft\ntask: sft\noptim:\n  lrr: 1\n"


def test_the_reports_of_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(RECIPE)
    before = signal.getsignal(signal.SIGTERM)
    try:
        for name, override in (("wrong", []), ("absent", ["template.allow=[D001]"])):
            Path("my.yaml").write_text(RECIPE if name == "wrong" else RECIPE.replace("lrr", "lr"))
            run(["sft", "my.yaml", *override, "--dry-run", "--json"])
            Path(f"{name}.json").write_text(capsys.readouterr().out)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert main(["my.yaml", "wrong.json", "absent.json", "absent.json"]) == 0
    log = json.loads(capsys.readouterr().out)
    (told,) = log["runs"]
    assert (log["version"], told["tool"]["driver"]["name"]) == ("2.1.0", "rlhfctl")
    results = told["results"]
    (wrong,) = [each for each in results if each["ruleId"] == "recipe"]
    place = wrong["locations"][0]["physicalLocation"]
    assert (wrong["level"], place["artifactLocation"]["uri"], place["region"]["startLine"]) == (
        "error",
        "my.yaml",
        4,
    )
    assert "unknown key optim.lrr" in wrong["message"]["text"]
    handled = [each for each in results if each["ruleId"] == "D001"]
    assert handled
    assert all("suppressions" in each and "Fix: " in each["message"]["text"] for each in handled)
    missing = [each for each in results if each["ruleId"] == "W001"]
    assert missing
    assert not any("suppressions" in each for each in missing)
    assert {each["id"] for each in told["tool"]["driver"]["rules"]} == {each["ruleId"] for each in results}


def test_what_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text('{"findings": [{}]}')
    assert main(["my.yaml", str(tmp_path / "x.json")]) == 2
    assert "x.json: not what --json or preflight.json holds" in capsys.readouterr().err
    assert main(["my.yaml", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err == f"cannot read {tmp_path / 'none.json'}: No such file or directory\n"
    assert main(["my.yaml"]) == 2
    assert capsys.readouterr().out == ""
