import io
import json

import pytest

from rlhfctl.run_dir import RunDir
from rlhfctl.tracking.metrics import append_jsonl, rounded
from rlhfctl.tracking.progress import Progress, duration, sparkline
from rlhfctl.worker import speaker


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_plain_lines(clock):
    said = []
    progress = Progress(400, 100, said.append, interactive=False)
    clock[0] += 38.0
    progress.update(120, {"loss/policy": 0.412, "reward/mean": 0.71, "kl/reference": 0.00004, "lr": 1.0})
    assert said == ["step 120/400  loss 0.412  reward 0.710  kl 4.0e-05  1.90 s/step  eta 9m"]


def test_the_live_line_is_rewritten_and_never_wraps(clock, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setenv("COLUMNS", "30")
    progress = Progress(10, 0, print, interactive=True)
    clock[0] += 1.0
    progress.update(1, {"loss/sft": 2.0})
    progress.update(10, {"loss/sft": 1.0})
    progress.close()
    progress.close()
    written = out.getvalue()
    assert written.endswith("\n")
    assert written.count("\n") == 1
    first, second = written.strip("\n").split("\x1b[K")[:2]
    assert first == "\rstep 1/10  loss 2.000  1.00 s"
    assert second == "\rstep 10/10  loss 1.000  0.10 "


def test_a_line_of_somebody_else_does_not_stand_behind_the_live_one(clock, monkeypatch, tmp_path):
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    progress = Progress(10, 0, print, interactive=True)
    say = speaker(RunDir(tmp_path), 1, 0, io.StringIO(), out)
    clock[0] += 1.0
    progress.update(1, {"reward/mean": 0.0})
    say("warning: all rewards are equal")
    say("and so on")
    progress.update(2, {"reward/mean": 0.0})
    progress.close()
    shown = [line.rpartition("\r")[2].replace("\x1b[K", "") for line in out.getvalue().split("\n")[:-1]]
    assert [line.split("  ")[0] for line in shown] == [
        "step 1/10",
        "warning: all rewards are equal",
        "and so on",
        "step 2/10",
    ]


def test_durations():
    assert [duration(seconds) for seconds in (5, 120, 7200)] == ["5s", "2m", "2.0h"]


def test_records_are_json_whatever_the_numbers(tmp_path):
    append_jsonl(tmp_path / "m.jsonl", {"step": 1, "a": float("nan"), "b": [1 / 3, float("inf")], "c": "ü"})
    record = json.loads((tmp_path / "m.jsonl").read_text())
    assert record == {"step": 1, "a": None, "b": [0.333333333, None], "c": "ü"}
    assert rounded({"x": (1e-20, True)}) == {"x": [1e-20, True]}


def test_the_sparkline_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparkline([0.0, 0.5, 1.0, 0.25]) == "▁▅█▃"
    assert sparkline([2.0, 2.0]) == "▁▁"
    for course, shown in ((True, "step 3/9  ▁▅█  reward 1.000"), (False, "step 3/9  reward 1.000")):
        progress = Progress(9, 0, print, interactive=True, course=course)
        for step, reward in enumerate((0.0, 0.5, 1.0), 1):
            progress.update(step, {"reward/mean": reward})
        assert capsys.readouterr().err.split("\r")[-1].startswith(shown)
    lines: list[str] = []
    Progress(9, 0, lines.append, interactive=False, course=True).update(1, {"reward/mean": 1.0})
    assert lines[0].startswith("step 1/9  reward")
