import json
from pathlib import Path

import pytest

from rlhfctl.quickstart.table import main, read_stage, render


def make_run(path: Path, metrics: list[dict[str, float]], task: str = "ppo") -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (path / "status.json").write_text(json.dumps({"state": "done", "step": 180}))
    (path / "recipe.yaml").write_text(f"task: {task}\nname: quickstart\n")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(
        tmp_path / "ppo",
        [
            {"step": 0, "eval/accuracy": 0.232, "eval/path_accuracy": 0.135},
            {"step": 1, "reward/mean": 0.3},
            {"step": 90, "eval/accuracy": 0.7, "eval/path_accuracy": 0.6},
            {"step": 180, "eval/accuracy": 0.9024, "eval/path_accuracy": 0.887},
            {"step": 180, "reward/mean": 0.9},
        ],
    )


def test_first_and_last_evaluation_count(run: Path) -> None:
    stage = read_stage(run)
    assert (stage["before"], stage["after"]) == (0.232, 0.9024)
    assert (stage["path_before"], stage["path_after"]) == (0.135, 0.887)
    assert (stage["task"], stage["state"], stage["steps"]) == ("ppo", "done", 180)


def test_table_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "sft", [{"step": 700, "eval/accuracy": 0.25}], task="sft")
    assert main([str(other), str(run)]) == 0
    header, sft, ppo = capsys.readouterr().out.splitlines()
    assert header == "stage  state  steps  of       accuracy before  after  whole path before  after  run"
    assert sft.split() == ["sft", "done", "700", "answers", "25.0", "25.0", "-", "-", str(other)]
    assert ppo.split() == ["ppo", "done", "180", "answers", "23.2", "90.2", "13.5", "88.7", str(run)]


def test_a_reward_model_is_measured_on_pairs(tmp_path: Path) -> None:
    rm = make_run(
        tmp_path / "rm", [{"step": 0, "eval/accuracy": 0.5}, {"step": 9, "eval/accuracy": 0.8}], "rm"
    )
    row = render([read_stage(rm)]).splitlines()[1]
    assert row.split() == ["rm", "done", "9", "pairs", "50.0", "80.0", "-", "-", str(rm)]


def test_columns_line_up(run: Path) -> None:
    lines = render([read_stage(run)]).splitlines()
    assert lines[0].index("run") == lines[1].index(str(run))
    assert lines[0].index("accuracy before") + len("accuracy before") == lines[1].index("23.2") + 4


@pytest.mark.parametrize(
    ("breakage", "sentence"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'), "holds no eval/accuracy"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step'), "is damaged"),
    ],
)
def test_a_run_without_evaluation_fails(run: Path, breakage, sentence: str, capsys) -> None:
    breakage(run)
    assert main([str(run)]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""


def test_usage() -> None:
    assert main([]) == 2
