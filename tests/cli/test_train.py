"""The training commands on a real run of three steps: directories, resume, dry run, --json, streams, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.cli.run_rules import check_changes, new_run
from rlhfctl.errors import UsageError
from rlhfctl.recipe.load import load_recipe, read_resolved
from rlhfctl.run_dir import RunDir

Cli = Callable[..., Any]
COMMAND = [sys.executable, "-m", "rlhfctl"]


@pytest.fixture(scope="module")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, done."""
    path = tmp_path_factory.mktemp("runs") / "done"
    words = [*COMMAND, "sft", "quickstart/sft", "--run-dir", str(path), "-q", *tiny]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to do as one likes with."""
    copy = tmp_path / "run"
    subprocess.run(["cp", "-a", str(finished), str(copy)], check=True)
    return copy


def test_a_run_in_the_default_directory(cli: Cli, tiny: list[str], tmp_path: Path) -> None:
    ended = cli("sft", "quickstart/sft", *tiny)
    assert ended.code == 0
    assert ended.out.startswith("runs/quickstart-sft/20")
    assert ended.out.count("\n") == 1
    path = tmp_path / ended.out.strip()
    assert ended.err.splitlines()[0] == f"run directory: {ended.out.strip()}"
    assert "step 3/3" in ended.err
    assert json.loads((path / "status.json").read_text())["state"] == "done"
    assert json.loads((path / "preflight.json").read_text())["exit_code"] == 0
    assert read_resolved(path / "recipe.yaml") == load_recipe("quickstart/sft", tiny).recipe
    assert [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_json_of_a_run(cli: Cli, tiny: list[str]) -> None:
    ended = cli("sft", "quickstart/sft", "--run-dir", "a", "--json", *tiny)
    told = ended.object
    assert (told["status"], told["run_dir"], told["state"], told["step"]) == ("ok", "a", "done", 3)
    assert {finding["severity"] for finding in told["findings"]} <= {"info", "warning"}


def test_a_quiet_run_says_nothing_and_keeps_its_lines(finished: Path) -> None:
    assert "step 3/3" in (finished / "logs/latest/console.log").read_text()


# Which directory


def test_a_used_directory_is_refused_and_untouched(cli: Cli, tiny: list[str], run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    ended = cli("sft", "quickstart/sft", "--run-dir", "run", "--json", *tiny)
    assert ended.object["status"] == "invalid"
    assert "run holds a run already (done at step 3)" in ended.err
    for way in ("--resume", "--run-dir", "remove it"):
        assert way in ended.err
    assert ended.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_directories_that_cannot_be_a_run(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    assert "file is a file" in cli("sft", "quickstart/sft", "--run-dir", "file").err
    assert "mine is not empty and holds no run" in cli("sft", "quickstart/sft", "--run-dir", "mine").err
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid():
        assert "cannot make the run directory" in cli("sft", "quickstart/sft", "--run-dir", "locked/x").err


def test_runs_of_one_second_get_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart/sft").recipe
    assert not new_run(recipe, None).path.exists()  # of a dry run
    assert len({new_run(recipe, None, claim=True).path for _ in range(3)}) == 3
    Path("blocked").write_text("")
    with pytest.raises(UsageError, match="cannot make the run directory"):
        RunDir("blocked/x").claim()


def holds(pid: int, file: Path) -> bool:
    """Whether the process has the file open: of a lock, that it has it or waits for it."""
    open_files = Path(f"/proc/{pid}/fd").iterdir()
    return any(os.path.realpath(each) == str(file) for each in open_files)


def test_a_directory_that_another_run_has_used_meanwhile_is_refused(tiny: list[str], tmp_path: Path) -> None:
    other = RunDir(tmp_path / "d")
    other.create()
    other.acquire_lock()  # another command, which chose the same directory and starts first
    other.preflight.write_text("{}")
    words = [*COMMAND, "sft", "quickstart/sft", "--run-dir", "d", "seed=2", *tiny]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not holds(process.pid, tmp_path / "d/.lock"):
        time.sleep(0.02)
    other.recipe.write_text("task: sft\n")
    other.metrics.write_text('{"step": 1}\n')
    other.write_status("done", step=1)
    other.release_lock()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "d holds a run already (done at step 1)" in err
    assert (other.preflight.read_text(), other.recipe.read_text()) == ("{}", "task: sft\n")
    assert other.metrics.read_text() == '{"step": 1}\n'


# --resume


def test_resume_of_a_finished_run_is_no_work_and_no_error(cli: Cli, run: Path) -> None:
    ended = cli("sft", "--resume", "--run-dir", "run")
    assert (ended.code, ended.out) == (0, "run\n")
    assert "done at step 3" in ended.err
    assert not (run / "logs/attempt_2").exists()
    assert cli("sft", "--resume", "--run-dir", "run", "--json").object["state"] == "done"


def test_resume_with_more_steps_goes_on_from_the_checkpoint(cli: Cli, run: Path) -> None:
    ended = cli("sft", "--resume", "--run-dir", "run", "train.steps=5")
    assert (ended.code, ended.out) == (0, "run\n")
    assert "changed: train.steps 3 -> 5" in ended.err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert (run / "logs/attempt_2").is_dir()
    assert read_resolved(run / "recipe.yaml").train.steps == 5


def test_resume_with_the_recipe_it_was_started_with(cli: Cli, tiny: list[str], run: Path) -> None:
    assert "done at step 3" in cli("sft", "quickstart/sft", "--resume", "--run-dir", "run", *tiny).err
    assert "done at step 3" in cli("sft", "run/recipe.yaml", "--resume", "--run-dir", "run").err


def test_resume_refuses_what_changes_the_training_and_names_the_keys(cli: Cli, run: Path) -> None:
    before = (run / "recipe.yaml").read_text()
    ended = cli("sft", "--resume", "--run-dir", "run", "optim.lr=1e-5", "seed=3", "train.steps=9")
    assert ended.code == 2
    assert "optim.lr (0.003 -> 1e-05)" in ended.err
    assert "seed (17 -> 3)" in ended.err
    assert "train.steps" not in ended.err
    assert "rlhfctl sft --resume --run-dir run" in ended.err
    assert (run / "recipe.yaml").read_text() == before
    assert "at step 3 already" in cli("sft", "--resume", "--run-dir", "run", "train.steps=2").err


@pytest.mark.heavy
def test_a_resume_that_is_refused_changes_nothing_for_the_next_one(
    cli: Cli, tiny: list[str], tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    rows = ['{"prompt": "1?", "response": "2"}\n', '{"prompt": "3?", "response": "4"}\n']
    data.write_text("".join(rows) * 4)
    words = [f"data.train=[{{path: {data}}}]", *(word for word in tiny if not word.startswith("data.train"))]
    assert cli("sft", "quickstart/sft", "--run-dir", "r", *words).code == 0
    data.write_text("".join(rows) * 5)
    refused = cli("sft", "--resume", "--run-dir", "r", "train.steps=5")
    assert refused.code == 2
    assert "d.jsonl changed since the run" in refused.err
    data.write_text("".join(rows) * 4)
    ended = cli("sft", "--resume", "--run-dir", "r", "train.steps=5")
    assert "changed: train.steps 3 -> 5" in ended.err
    assert "done at step 5" in ended.err


def test_steps_are_those_of_one_phase(tmp_path: Path) -> None:
    """Ten steps of warm-up and five of the second phase: that phase may still end after six."""
    run = RunDir(tmp_path / "run")
    run.create()
    run.commit_checkpoint(15, lambda place: (place / "trainer.json").write_text("{}"))
    before = load_recipe("quickstart/reft", ["train.steps=100"]).recipe

    def resumed(steps: int) -> dict[str, str]:
        return check_changes(run, before, load_recipe("quickstart/reft", [f"train.steps={steps}"]).recipe)

    with pytest.raises(UsageError, match=r"is at step 15 already$"):  # all of them in the first phase
        resumed(14)
    run.commit_phase(run.warmup, lambda place: (place / "phase.json").write_text('{"step": 10}'))
    assert resumed(6) == {"train.steps": "100 -> 6"}
    with pytest.raises(UsageError, match=r"is at step 15 already, 5 of its phase$"):
        resumed(4)


def test_a_run_that_has_passed_its_data_twice_has_not_passed_it_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    once, twice, thrice = (
        load_recipe("quickstart/sft", ["train.steps=null", f"train.epochs={epochs}"]).recipe
        for epochs in (1, 2, 3)
    )
    run.write_status("interrupted", step=2)
    assert check_changes(run, twice, once) == {"train.epochs": "2 -> 1"}
    run.write_status("done", step=9)
    assert check_changes(run, twice, thrice) == {"train.epochs": "2 -> 3"}
    with pytest.raises(UsageError, match="has passed its data 2 times already"):
        check_changes(run, twice, once)


def test_a_policy_that_a_value_was_fitted_to_trains_no_further(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    before, after = (
        load_recipe("quickstart/oreo-rounds", [f"train.steps={steps}"]).recipe for steps in (300, 400)
    )
    assert check_changes(run, before, after) == {"train.steps": "300 -> 400"}
    run.commit_final(lambda place: (place / "phase.json").write_text('{"step": 600}'))
    with pytest.raises(UsageError, match="has fitted a value to its final policy"):
        check_changes(run, before, after)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["sft", "--resume"], "--resume needs --run-dir DIR"),
        (["sft", "quickstart/sft", "--resume"], "the newest run of quickstart-sft is runs/quickstart-sft/20"),
        (
            ["sft", "--resume", "--run-dir", "nowhere"],
            "there is no run in nowhere to continue: start it without",
        ),
        (["sft", "--resume", "--run-dir", "runs"], "runs holds no run to continue: it has no recipe.yaml"),
        (["ppo", "--resume", "--run-dir", "run"], "run is a run of sft, not of ppo: `rlhfctl sft --resume"),
        (["ppo", "quickstart/ppo", "--resume", "--run-dir", "run"], "run is a run of sft, not of ppo"),
    ],
)
def test_resume_without_a_run_to_resume(cli: Cli, run: Path, args: list[str], said: str) -> None:
    old = run.parent / "runs/quickstart-sft/20260101-000000"
    old.mkdir(parents=True)
    (old / "recipe.yaml").write_text("")
    ended = cli(*args)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_run_killed_before_its_first_checkpoint_starts_over(cli: Cli, run: Path) -> None:
    subprocess.run(["rm", "-r", str(run / "checkpoints"), str(run / "final")], check=True)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    before = (run / "metrics.jsonl").read_text()
    assert cli("sft", "--resume", "--run-dir", "run", "-q").code == 0
    strip = [json.loads(line)["loss/sft"] for line in before.splitlines()]
    assert [
        json.loads(line)["loss/sft"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ] == strip


# --dry-run


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(
    cli: Cli, tiny: list[str], tmp_path: Path
) -> None:
    ended = cli("sft", "quickstart/sft", "-n", *tiny)
    assert ended.code == 0
    (tmp_path / "resolved.yaml").write_text(ended.out)
    assert read_resolved(tmp_path / "resolved.yaml") == load_recipe("quickstart/sft", tiny).recipe
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resolved.yaml"]
    told = cli("sft", "quickstart/sft", "-n", "--json", *tiny).object
    assert told["recipe"]["train"]["steps"] == 3
    assert told["run_dir"] is None
    assert cli("sft", "resolved.yaml", "-n").out == ended.out


def test_dry_run_into_a_directory_leaves_the_report_alone_and_the_run_can_start_there(
    cli: Cli, tiny: list[str], tmp_path: Path
) -> None:
    assert cli("sft", "quickstart/sft", "-n", "--run-dir", "d", *tiny).code == 0
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["preflight.json"]
    assert cli("sft", "quickstart/sft", "-n", "--run-dir", "d", *tiny).code == 0


def test_preflight_refuses_and_writes_the_report_alone(cli: Cli, tmp_path: Path) -> None:
    for dry in ([], ["--dry-run"]):
        ended = cli("ppo", "quickstart/ppo", "--run-dir", "d", "--json", *dry)
        told = ended.object
        assert (ended.code, told["status"]) == (5, "refused")
        assert told["message"].startswith("not started: ")
        errors = [finding for finding in told["findings"] if finding["severity"] == "error"]
        assert {"W001", "D001"} <= {finding["id"] for finding in errors}
        assert all(finding["fix"] for finding in errors)
        assert [path.name for path in (tmp_path / "d").iterdir()] == ["preflight.json"]
        assert json.loads((tmp_path / "d/preflight.json").read_text())["findings"] == told["findings"]
        assert "fix: " in ended.err


# stdout and signals


def test_a_reader_that_goes_away_changes_nothing(tiny: list[str], tmp_path: Path) -> None:
    script = f"{' '.join(COMMAND)} ppo quickstart/ppo --dry-run -q 2>err | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "5\n"
    assert "Broken" not in (tmp_path / "err").read_text()
    closed = f"{' '.join(COMMAND)} recipes >&-; echo $?"
    done = subprocess.run(["bash", "-c", closed], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_result_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} recipes >/dev/full"], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "cannot write the result to stdout: No space left on device\n"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_anything_is_started(tmp_path: Path, signum: int, code: int) -> None:
    process = subprocess.Popen(
        [*COMMAND, "sft", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    wait_until_it_reads(process.pid)
    process.send_signal(signum)
    process.wait(timeout=30)
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == code
    assert json.loads(out)["status"] == "interrupted"
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_check_waits_is_no_finding(
    tiny: list[str], tmp_path: Path, signum: int, code: int
) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\ndef score(samples):\n    pathlib.Path('called').touch()\n    time.sleep(60)\n"
    )
    changes = {"data.eval": tiny[2].partition("=")[2], "reward": "{sources: [{kind: python, path: slow.py}]}"}
    words = [f"{key}={changes.get(key, value)}" for key, _, value in (word.partition("=") for word in tiny)]
    process = subprocess.Popen(
        [*COMMAND, "sft", "quickstart/sft", "--json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (tmp_path / "called").exists():
        time.sleep(0.02)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, json.loads(out)["status"]) == (code, "interrupted")
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/*"))


def wait_until_it_reads(pid: int) -> None:
    """Until the process waits for its standard input, pydantic and all imported."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (
            "pipe" in Path(f"/proc/{pid}/wchan").read_text()
            and "pydantic" in Path(f"/proc/{pid}/maps").read_text()
        ):
            return
        time.sleep(0.02)
    pytest.fail("it never read its standard input")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_training_keeps_a_checkpoint(
    tiny: list[str], tmp_path: Path, signum: int, code: int
) -> None:
    words = [*COMMAND, "sft", "quickstart/sft", "--run-dir", "r", "--json", *tiny, "train.epochs=500"]
    words = [word for word in words if not word.startswith("train.steps")] + ["train.steps=null"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    metrics = tmp_path / "r/metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    told = json.loads(out)
    assert (process.returncode, told["exit_code"], told["status"]) == (code, code, "interrupted")
    assert "Traceback" not in err
    assert (tmp_path / "r/checkpoints" / f"step_{told['step']:06d}").is_dir()
