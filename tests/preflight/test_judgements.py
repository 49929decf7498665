"""What preflight says of a reward model's run: data without contrast, length as a shortcut, the head it starts from."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfctl.preflight.run import Report, run_preflight
from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.tasks import RmRecipe

PAIR = {"prompt": "1+2?", "chosen": "#3", "rejected": "#4"}


def report(
    tmp_path: Path, chains: Path, rows: list[dict[str, Any]], policy: Any = None, **algorithm: Any
) -> Report:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(chains / "model")
    recipe = RmRecipe.model_validate(
        {
            "task": "rm",
            "name": "x",
            "policy": policy or {"from_config": model, "tokenizer": model},
            "data": {"train": [{"path": str(path)}], "max_length": 64},
            "train": {"steps": 1, "batch_size": 2},
            "algorithm": algorithm,
        }
    )
    return run_preflight(SimpleNamespace(recipe=recipe))


def ids(found: Report, severity: str = "error") -> list[str]:
    return [finding.id for finding in found.findings if finding.severity == severity]


def test_a_good_recipe_passes(tmp_path: Path, chains: Path) -> None:
    found = report(tmp_path, chains, [PAIR, PAIR | {"prompt": "2+2?", "chosen": "#4", "rejected": "#5"}])
    assert (ids(found), found.exit_code) == ([], 0)
    assert "M003" not in ids(found, "warning")


def test_the_objective_finds_nothing_in_the_data(tmp_path: Path, chains: Path) -> None:
    found = report(tmp_path, chains, [PAIR], objective="step")
    assert found.exit_code == 5
    assert ids(found) == ["D005"]
    assert "the objective is step" in found.findings[0].detail


@pytest.mark.parametrize("reward", [0, 1])
def test_answers_that_are_all_alike(tmp_path: Path, chains: Path, reward: int) -> None:
    rows = [{"prompt": f"{digit}?", "response": "#1", "reward": reward} for digit in range(4)]
    found = report(tmp_path, chains, rows, objective="outcome")
    assert (ids(found), found.exit_code) == (["D007"], 5)
    rows[0]["reward"] = 1 - reward
    assert ids(report(tmp_path, chains, rows, objective="outcome")) == []


def test_steps_that_are_all_right(tmp_path: Path, chains: Path) -> None:
    row = {"prompt": "1?", "completions": ["1", "2"], "labels": [True, True]}
    assert ids(report(tmp_path, chains, [row], objective="step")) == ["D007"]
    assert ids(report(tmp_path, chains, [row | {"labels": [True, False]}], objective="step")) == []


def test_length_as_a_shortcut(tmp_path: Path, chains: Path) -> None:
    longer = {"prompt": "1?", "chosen": "1+2=3\n#3", "rejected": "#3"}
    found = report(tmp_path, chains, [longer | {"prompt": f"{digit}?"} for digit in range(5)])
    warning = next(finding for finding in found.findings if finding.id == "D008")
    assert "the longer answer is the chosen one in 100%" in warning.title
    assert found.exit_code == 0
    shorter = {"prompt": "1?", "chosen": "#3", "rejected": "1+2=3\n#3"}
    warning = next(f for f in report(tmp_path, chains, [shorter]).findings if f.id == "D008")
    assert "the shorter answer" in warning.title
    assert "D008" not in ids(report(tmp_path, chains, [longer, shorter]), "warning")


def checkpoint(directory: Path, tensors: dict[str, tuple[list[int], bytes]]) -> Path:
    """A model directory whose safetensors file holds float32 tensors."""
    write_model(directory)
    header, data = {}, b""
    for name, (shape, raw) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return directory


ONES, TRUNK = struct.pack("<64f", *[1.0] * 64), ([4], bytes(16))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.x": TRUNK}, "gets a new reward head"),
        ({"model.x": TRUNK, "score.weight": ([1, 64], ONES)}, "starts from the checkpoint's reward head"),
    ],
)
def test_the_head_it_starts_from(tmp_path: Path, chains: Path, tensors: dict, said: str) -> None:
    path = checkpoint(tmp_path / "m", tensors)
    found = report(tmp_path, chains, [PAIR], {"path": str(path)})
    assert said in next(finding.title for finding in found.findings if finding.id == "W013")


def test_an_unusable_head_is_refused_unless_a_new_one_is_asked_for(tmp_path: Path, chains: Path) -> None:
    path = checkpoint(tmp_path / "m", {"model.x": TRUNK, "score.weight": ([2, 32], ONES)})
    found = report(tmp_path, chains, [PAIR], {"path": str(path)})
    assert (ids(found), found.exit_code) == (["W008"], 5)
    assert "algorithm.head: zero" in found.findings[0].fix
    assert ids(report(tmp_path, chains, [PAIR], {"path": str(path)}, head="zero")) == []
    nan = struct.pack("<64f", *[float("nan")] * 64)
    path = checkpoint(tmp_path / "n", {"model.x": TRUNK, "score.weight": ([1, 64], nan)})
    assert ids(report(tmp_path, chains, [PAIR], {"path": str(path)})) == ["W009"]


def test_a_padding_token_that_ends_answers(tmp_path: Path, chains: Path) -> None:
    model = tmp_path / "m"
    write_model(model)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(values | {"pad_token": "<eos>"}))
    found = report(tmp_path, chains, [PAIR], {"from_config": str(model), "tokenizer": str(model)})
    assert "W014" in ids(found, "warning")


def test_steps_that_are_split_otherwise_when_they_are_scored(tmp_path: Path, chains: Path) -> None:
    rows = [
        {"prompt": "1+2?", "completions": ["1+2=3\n1+1=2", "#3"], "labels": [True, False]},
        {"prompt": "2+2?", "completions": ["2+2=4\n", "#4"], "labels": [True, True]},
    ]
    found = report(tmp_path, chains, rows, objective="step")
    told = [finding for finding in found.findings if finding.id == "D019"]
    assert [finding.severity for finding in told] == ["warning"]
    assert told[0].title.startswith("data.train: 1 of 2 answers have other steps")
    assert "rows.jsonl:1" in told[0].detail
    # A model of whole answers reads no ends of steps.
    assert "D019" not in ids(report(tmp_path, chains, [*rows, PAIR], step_coef=1.0), "warning")
