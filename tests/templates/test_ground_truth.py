"""The gate against the corpus: single templates, pairs, renders, bridge mode, exit code, speed."""

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pace import assert_within

from rlhfctl.templates.inspect import Options, Report, inspect
from rlhfctl.templates.sides import Side

Bare = Callable[[str], Side]

CLOCK = datetime(2025, 1, 15)
MODES = {"re-render after folding the system message into the first user turn": "re-render+fold-system"}


@pytest.fixture(scope="module")
def truth(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "chat-templates" / "pairs.json").read_text())


@pytest.fixture(scope="module")
def alone(bare_side: Bare, entries: dict) -> dict[str, Report]:
    """The report of each template, by its name."""
    return {name: inspect(bare_side(name), options=Options(clock=CLOCK)) for name in entries}


@pytest.fixture(scope="module")
def together(bare_side: Bare, truth: dict) -> dict[str, Report]:
    """The report of each pair, by its id."""

    def report(pair: dict[str, Any]) -> Report:
        messages = pair["expected_renders"]["messages"] if pair.get("expected_renders") else None
        sides = (bare_side(pair[side]) for side in ("policy", "rm"))
        return inspect(*sides, Options(clock=CLOCK, messages=messages))

    return {pair["id"]: report(pair) for pair in truth["pairs"]}


def test_every_template_alone(alone: dict[str, Report], entries: dict, truth: dict) -> None:
    for name, entry in entries.items():
        got = {found.id for found in alone[name].findings}
        judged = set(truth["ids"]) - set(entry["findings_undecided"])
        assert got & judged == set(entry["findings"]), name


def test_every_pair(together: dict[str, Report], truth: dict) -> None:
    assert len(truth["pairs"]) == 67
    for pair in truth["pairs"]:
        expected, report = pair.get("expected_renders"), together[pair["id"]]
        for side in ("policy", "rm", "pair"):
            got = {found.id for found in report.findings if found.side == side}
            assert set(pair["must"].get(side, [])) <= got, (pair["id"], side)
            assert not set(pair["must_not"].get(side, [])) & got, (pair["id"], side)
        if expected:
            assert report.renders == {"policy": expected["policy"], "rm": expected["rm"]}, pair["id"]
        assert report.bridge["mode"] == MODES.get(pair["bridge"], pair["bridge"]), pair["id"]
        assert report.exit_code == (3 if pair["worst"] == "error" else 0), pair["id"]
        leaks = [found.evidence["leaking_terminators"] for found in report.findings if found.id == "P011"]
        assert sorted(leaks[0] if leaks else []) == sorted(pair.get("leaking_terminators", [])), pair["id"]


def test_severities_are_the_vocabulary_s(together: dict[str, Report], truth: dict) -> None:
    """pairs.json holds the severity of a plain run; what concerns sampling counts less on the reward model's side."""
    for name, report in together.items():
        for found in report.findings:
            if found.id not in truth["ids"]:
                continue
            stated = truth["ids"][found.id]["severity"]
            if found.side == "rm" and found.id in ("T020", "T021", "T023", "T024", "T025"):
                assert found.severity == "info"
            elif found.side == "policy" and found.id == "T022":
                assert found.severity == "warning"
            else:
                assert found.severity == stated, (name, found.id)


def test_order_and_shape_of_the_report(bare_side: Bare) -> None:
    policy, rm = (bare_side(name) for name in ("qwen2.5-7b-instruct", "gemma-2-2b-it"))
    report = inspect(policy, rm, Options(clock=CLOCK)).as_dict()
    sides, severities = ["policy", "rm", "pair"], ["error", "warning", "info"]
    keys = [(sides.index(f["side"]), severities.index(f["severity"]), f["id"]) for f in report["findings"]]
    assert keys == sorted(keys)
    assert report["status"] == "mismatch"
    assert report["summary"]["handled"] == 0
    assert report["summary"]["error"] == sum(f["severity"] == "error" for f in report["findings"])
    assert all(
        set(f) == {"id", "side", "severity", "handled", "title", "detail", "evidence", "fix"}
        for f in report["findings"]
    )
    assert json.loads(json.dumps(report)) == report


def test_bridge_handles_what_it_repairs(bare_side: Bare) -> None:
    qwen, llama, gemma = "qwen2.5-7b-instruct", "llama-3-8b-instruct", "gemma-2-2b-it"
    hermes = "hermes-3-llama-3.1-8b"

    def run(policy: str, rm: str, **options: Any) -> tuple[int, set[str]]:
        report = inspect(bare_side(policy), bare_side(rm), Options(clock=CLOCK, **options))
        return report.exit_code, {found.id for found in report.findings if found.handled}

    assert run(qwen, llama) == (3, set())
    assert run(qwen, llama, bridge=True) == (0, {"P001", "P011"})
    assert run(qwen, gemma, bridge=True) == (3, {"P001", "P011"})
    code, handled = run(qwen, gemma, bridge=True, fold_system=True)
    assert code == 0
    assert "P007" in handled
    _, handled = run(qwen, gemma, bridge=True, fold_system=True, merge_roles=True)
    assert {"P009", "T014"} <= handled
    assert run(qwen, hermes, bridge=True) == (3, set())


def test_strict_and_allow(bare_side: Bare) -> None:
    side = bare_side("qwen2.5-7b-instruct")
    assert inspect(side, options=Options(clock=CLOCK)).exit_code == 0
    assert inspect(side, options=Options(clock=CLOCK, strict=True)).exit_code == 3
    found = {f.id for f in inspect(side, options=Options(clock=CLOCK)).findings if f.severity == "warning"}
    assert inspect(side, options=Options(clock=CLOCK, strict=True, allow=frozenset(found))).exit_code == 0


@pytest.mark.timed
def test_speed_without_tokenizers(bare_side: Bare, entries: dict, truth: dict) -> None:
    """Under 100 ms a pair; CPU of the rendering child included."""

    def per_pair() -> float:
        before = sum(os.times()[:4])
        for pair in truth["pairs"]:
            inspect(*(bare_side(pair[side]) for side in ("policy", "rm")), Options(clock=CLOCK))
        return (sum(os.times()[:4]) - before) / len(truth["pairs"])

    assert_within(0.1, per_pair)


def test_anatomy_of_every_template(alone: dict[str, Report], entries: dict) -> None:
    """How a conversation is taken apart: headers, terminators, cue and preamble as measured for the corpus."""
    names = {
        "user_header": "user_header", "terminator": "terminator_mid", "preamble": "preamble",
        "after_final": "after_final_assistant", "cue": "assistant_cue",
    }  # fmt: skip
    compared = 0
    for name, entry in entries.items():
        if not entry["renders_under_transformers"]:
            continue
        facts = alone[name].policy
        for ours, theirs in names.items():
            assert facts[ours] == entry["observed"][theirs], (name, ours)
            compared += 1
    assert compared == 76 * len(names)
