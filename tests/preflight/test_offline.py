"""What preflight says of an oreo run whose data, prompts or value model cannot do: one sentence each."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.run import Report, run_preflight
from rlhfctl.quickstart.family import CHATML, write_model
from rlhfctl.recipe.load import load_recipe

RIGHT = {"prompt": "1+2?", "response": "1+2=3\n#3", "reward": 1.0}
WRONG = {"prompt": "2+2?", "response": "2+2=5\n#5", "reward": 0.0}


def report(tmp_path: Path, chains: Path, rows: list[dict[str, Any]], *overrides: str) -> Report:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "policy.path": "null",
        "policy.from_config": f"{chains}/model",
        "policy.tokenizer": f"{chains}/model",
        "data.train": f"[{{path: {path}}}]",
        "data.eval": "[]",
        "reward": "null",
        "rollout": "null",
    } | dict(override.split("=", 1) for override in overrides)
    recipe = load_recipe("quickstart/oreo", [f"{key}={value}" for key, value in own.items()]).recipe
    return run_preflight(SimpleNamespace(recipe=recipe))  # type: ignore[arg-type]


def errors(found: Report) -> list[Finding]:
    return [finding for finding in found.findings if finding.severity == "error"]


def test_both_kinds_pass(tmp_path: Path, chains: Path) -> None:
    found = report(tmp_path, chains, [RIGHT, WRONG])
    assert (errors(found), found.exit_code) == ([], 0)
    (told,) = [finding for finding in found.findings if finding.id == "D018"]
    counted = "2 trajectories, 1 right, 1 wrong; steps per trajectory: mean 2.0, from 2 to 2"
    assert told.title == f"data.train: {counted}"


@pytest.mark.parametrize(
    ("rows", "overrides", "id", "said"),
    [
        ([RIGHT, {"prompt": "1?", "response": "1"}], (), "D001", "row 2: has no reward"),
        ([RIGHT, WRONG | {"reward": 3}], (), "C002", "reward 3, outside algorithm.reward_range [0, 1]"),
        ([RIGHT, RIGHT | {"prompt": "3?"}], (), "D015", "2 right and 0 wrong answers"),
        ([WRONG], (), "D015", "0 right and 1 wrong answers"),
        (
            [RIGHT | {"steps": ["1+2=3", "#4"]}, WRONG],
            ("algorithm.level=step",),
            "C002",
            "rows.jsonl:1: its steps joined by data.*.step_separator do not rebuild its response",
        ),
        (
            [RIGHT, WRONG],
            ("algorithm.level=step", 'algorithm.step_delimiters=[";"]'),
            "D015",
            "none of 2 responses holds a step delimiter (';')",
        ),
        ([RIGHT, WRONG | {"truncated": True}], (), "D015", "1 right and 0 wrong answers"),
        ([RIGHT, WRONG | {"prompt": "[INST] 2+2? [/INST]"}], (), "C002", "through a chat template already"),
    ],
)
def test_rows_that_teach_nothing_or_the_wrong_thing(
    tmp_path: Path, chains: Path, rows: list[dict[str, Any]], overrides: tuple[str, ...], id: str, said: str
) -> None:
    found = report(tmp_path, chains, rows, *overrides)
    first, *more = errors(found)
    assert (first.id, more, found.exit_code) == (id, [], 5)
    assert said in f"{first.title}: {first.detail}"


def test_truncated_answers_are_counted(tmp_path: Path, chains: Path) -> None:
    found = report(tmp_path, chains, [RIGHT, WRONG, RIGHT | {"prompt": "3?", "finish": "length"}])
    (told,) = [finding for finding in found.findings if finding.id == "D006"]
    assert "1 of 3 rows are left out" in told.title
    assert "1 cut before their end" in told.detail


def test_a_value_model_of_other_words(tmp_path: Path, chains: Path) -> None:
    write_model(tmp_path / "other", CHATML)
    found = report(tmp_path, chains, [RIGHT, WRONG], f"value_model.init={tmp_path}/other")
    told = next(finding for finding in errors(found) if finding.id == "W024")
    assert told.title == f"value_model.init: {tmp_path}/other has another vocabulary than the policy"
    assert found.exit_code == 5
    (told,) = errors(report(tmp_path, chains, [RIGHT, WRONG], "value_model.init=no/such/place"))
    assert "value_model.init: no/such/place does not exist" in told.title
    assert not errors(report(tmp_path, chains, [RIGHT, WRONG], "value_model.init=policy"))


def test_evaluation_prompts_that_are_trained_on(tmp_path: Path, chains: Path) -> None:
    asked = [{"question": text, "answer": "3"} for text in ("1+2?", "9*9?")]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = report(
        tmp_path,
        chains,
        [RIGHT, WRONG],
        f"data.eval=[{{path: {tmp_path}/eval.jsonl}}]",
        "reward={sources: [{kind: verifier, name: chain_answer}]}",
        "rollout={max_new_tokens: 32}",
    )
    (told,) = [finding for finding in found.findings if finding.id == "D016"]
    assert (told.severity, told.title) == ("warning", "data.eval: 1 of 2 prompts are in data.train too")
    assert found.exit_code == 0


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        ("{prompts: [{path: PROMPTS}], held_out: 2}", "holds 2 prompts, and value_fit.held_out keeps 2"),
        ("{prompts: [{path: nowhere.jsonl}]}", "no such data file"),
        ("{prompts: [{path: PROMPTS}], held_out: 1}", None),
    ],
)
def test_prompts_of_the_value_fit(tmp_path: Path, chains: Path, fit: str, said: str | None) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"{d}+1?", "answer": "1"}) + "\n" for d in (0, 4)))
    found = report(
        tmp_path,
        chains,
        [RIGHT, WRONG],
        f"value_fit={fit.replace('PROMPTS', str(prompts))}",
        "reward={sources: [{kind: verifier, name: chain_answer}]}",
        "rollout={max_new_tokens: 32}",
    )
    assert [finding.id for finding in errors(found)] == (["D017"] if said else [])
    assert said is None or said in f"{errors(found)[0].title}: {errors(found)[0].detail}"


def test_a_run_of_rounds_reads_prompts(tmp_path: Path, chains: Path) -> None:
    rows = [{"question": f"{digit}+1?", "answer": "1"} for digit in range(4)]
    more = ("collect={rounds: 2}", "reward={sources: [{kind: verifier, name: chain_answer}]}")
    more += ("rollout={max_new_tokens: 32}",)
    found = report(tmp_path, chains, rows, *more)
    assert errors(found) == []
    (read,) = [finding for finding in found.findings if finding.id == "D004"]
    assert "4 of 4 rows" in read.title
    assert "read as qa" in read.title
