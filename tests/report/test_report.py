"""The report of runs as their files tell it: what it shows, damage it survives, and what a browser makes of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhfctl.report.chart import MOST_POINTS, chart, thin, ticks
from rlhfctl.report.page import page
from rlhfctl.report.read import differences, read_run
from rlhfctl.report.samples import chosen
from rlhfctl.tracking.metrics import append_jsonl

VOID = {"meta", "br", "line", "circle"}


def make_run(path: Path, lr: str = "1e-3", steps: int = 30) -> Path:
    path.mkdir()
    (path / "recipe.yaml").write_text(f"task: ppo\nname: demo\noptim:\n  lr: {lr}\n")
    (path / "status.json").write_text(json.dumps({"state": "done", "step": steps, "reason": None}))
    rows = [
        {"step": s, "reward/mean": s / steps, "kl/reference": 0.01 * s, "odd/metric": 1.0}
        for s in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finding = {"severity": "warning", "id": "T012", "title": "a <b>title</b>", "fix": "do this"}
    (path / "preflight.json").write_text(json.dumps({"findings": [finding]}))
    tokens = {"texts": ["3", "<x>", "#"], "rewards": [0.0, 1.0, None], "advantages": [-2.0, 0.5, None]}
    sample = {"step": 1, "prompt": "<script>alert(1)</script>", "response": "r", "tokens": 3}
    tables = {"table": {**tokens, "log_ratios": None}}
    samples = [{**sample, "shaped_reward": float(i), **tables} for i in range(8)]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    failed = [{"source": "remote", "status": "timeout", "error": "60 s"}] * 3
    (path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in failed))
    return path


class Nesting(HTMLParser):
    """Collects tags and complains of one that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", "2e-3"))])
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parser.seen}
    assert not any({"src", "href", "onload"} & set(attributes) for _, attributes in parser.seen)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    for said in ("optim.lr", "0.002", "T012", "a &lt;b&gt;title", "timeout", "60 s", "&lt;x&gt;"):
        assert said in text


def test_tokens_are_coloured_by_the_side_of_zero_and_their_size(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "a"))])
    assert "<span class='above' style='--a:0.75' title='1'>&lt;x&gt;</span>" in text
    assert "<span class='below' style='--a:0.75' title='-2'>3</span>" in text
    assert "<span class='above' style='--a:0.188' title='0.5'>" in text
    assert "<span class='observed'>#</span>" in text
    assert "log pi" not in text  # there is no reference


def test_best_worst_and_others(tmp_path: Path) -> None:
    picked = [(kind, row["shaped_reward"]) for kind, row in chosen(read_run(make_run(tmp_path / "a")))]
    assert picked[:6] == [("best", 7), ("best", 6), ("best", 5), ("worst", 0), ("worst", 1), ("worst", 2)]
    assert {kind for kind, _ in picked[6:]} == {"random"}
    assert {reward for _, reward in picked[6:]} <= {3, 4}


def test_damaged_files_are_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "reward/me')
    (run / "status.json").write_text("{")
    (run / "preflight.json").unlink()
    read = read_run(run)
    assert [line.split(":")[0] for line in read.damaged] == ["status.json", "metrics.jsonl"]
    assert len(read.series("reward/mean")) == 30
    assert "damaged: metrics.jsonl: 1 line(s)" in page([read])


def test_the_verdict_tells_how_a_run_went_that_evaluated_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    said = {}
    for name in ("loss/sft", "rm/accuracy", "eval/accuracy"):
        with open(run / "metrics.jsonl", "w") as file:
            for step in (1, 2):
                file.write(
                    json.dumps({"step": step, "grad_norm": 1, "loss/sft": 3 / step, name: step / 4}) + "\n"
                )
        said[name] = re.findall(r"(\S+ \S+ → [0-9.]+)", page([read_run(run)]))
    assert said == {name: [f"{name} 0.25 → 0.5"] for name in said}


def test_a_file_that_cannot_be_opened_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "quarantine.jsonl").unlink()
    (run / "quarantine.jsonl").mkdir()  # what any user fails to open
    read = read_run(run)
    assert [line.split(":")[0] for line in read.damaged] == ["quarantine.jsonl"]
    assert len(read.samples) == 8
    assert "damaged: quarantine.jsonl" in page([read])


def test_what_is_no_character_is_a_question_mark(tmp_path: Path) -> None:
    run = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 2, "shaped_reward": 9, "response": "half \\ud83d"}\n')
    text = page([read_run(run)])
    assert "half ?" in text
    assert "/caf?</b>" in text
    text.encode()


def test_a_response_with_a_line_separator_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "samples.jsonl").unlink()
    append_jsonl(
        run / "samples.jsonl", {"step": 1, "response": "one\u2028two\u0085three", "shaped_reward": 1}
    )
    append_jsonl(run / "quarantine.jsonl", {"source": "s", "status": "error", "error": "at \u2029"})
    read = read_run(run)
    assert read.damaged == []
    assert [row["response"] for row in read.samples] == ["one\u2028two\u0085three"]
    assert sum(read.quarantine.values()) == 4


def test_a_point_that_is_no_finite_number_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        for number in ("NaN", "Infinity", "-Infinity", "1e999", "1" + 400 * "0", "1e308", "-1e308"):
            file.write(f'{{"step": 9, "reward/mean": {number}, "loss/none": {number}}}\n')
    read = read_run(run)
    assert [step for step, _ in read.series("reward/mean")] == [1.0, 2.0, 3.0]
    assert "loss/none" not in read.numbers()
    drawn = page([read])
    assert "nan" not in drawn.lower()
    assert "loss/none" not in drawn


def test_differences_are_those_of_the_recipes(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", "2e-3"))]
    assert differences(runs) == [("optim.lr", [0.001, 0.002])]
    assert differences([runs[0], runs[0]]) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 60.0, [0, 20, 40, 60]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_reach_around(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_a_spike() -> None:
    line = [(float(x), 0.0) for x in range(20_000)]
    line[7_777] = (7_777.0, 5.0)
    kept = thin(line)
    assert len(kept) <= 2 * MOST_POINTS
    assert (7_777.0, 5.0) in kept
    assert kept == sorted(kept)


def test_points_stand_where_they_belong() -> None:
    drawn = chart("t", [("empty", []), ("one", [(0.0, 0.0), (4.0, 1.0)])])
    assert 'class="line1" points="52.0,164.0 350.0,10.0"' in drawn
    assert "line0" not in drawn
    assert "nan" not in chart("flat", [("a", [(1.0, 2.0)])])


def test_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")

    def report(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlhfctl", "report", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert report("a").stdout == "a/report.html\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    told = json.loads(report("a", "--json", "-o", "b.html").stdout)
    assert (told["status"], told["report"], told["runs"][0]["state"]) == ("ok", "b.html", "done")
    for words, said in (
        ([], "which run?"),
        (["nothing"], "nothing is not a run directory: it has no recipe.yaml"),
    ):
        ended = report(*words)
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
        assert said in ended.stderr
    ended = report("a", "-o", "missing/dir/x.html")
    assert ended.returncode == 4
    assert "cannot write missing/dir/x.html" in ended.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is missing")
        pytest.skip("chromium is missing")
    (tmp_path / "report.html").write_text(page([read_run(make_run(tmp_path / "a"))]))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--window-size={width},900", "--enable-logging=stderr", "--v=0"]
    shot = tmp_path / "shot.png"
    address = (tmp_path / "report.html").as_uri()
    seen = subprocess.run(
        [browser, *flags, f"--screenshot={shot}", address], capture_output=True, text=True, timeout=120
    )
    assert shot.stat().st_size > 10_000, seen.stderr
    assert not re.search(r"CONSOLE.*(error|refused|failed)", seen.stderr, re.IGNORECASE)
    dom = subprocess.run(
        [browser, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=120
    )
    assert dom.stdout.count("<figure>") == 3
    assert dom.stdout.count("<polyline") == 3
