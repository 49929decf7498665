"""What a user's mistake gets: the exit code, a sentence, no traceback, nothing started and nothing lost."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.run_dir import RunDir

HEAVY = pytest.mark.heavy


def keys(chains: Path, task: str, **changes: str) -> list[str]:
    """Overrides that make the quickstart recipe of a task tiny; double underscores in names stand for dots."""
    tiny = {
        "data.train": f"[{{path: {chains}/data/{'sft' if task == 'sft' else 'prompts'}.jsonl}}]",
        "data.eval": "[]",
        "train.steps": "6",
        "train.save_every": "2",
        "train.log_every": "1",
        "train.batch_size": "16",
        "launch.threads": "1",
    }
    if task == "sft":
        tiny |= {"policy.from_config": f"{chains}/model", "policy.tokenizer": f"{chains}/model"}
        tiny |= {"reward": "null", "rollout": "null"}
    else:
        tiny["policy"] = f"{{from_config: {chains}/model, tokenizer: {chains}/model}}"
    tiny |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in tiny.items()]


def command(chains: Path, task: str, run_dir: Path, *options: str, **changes: str) -> list[str]:
    arguments = [
        task,
        f"quickstart/{task}",
        *keys(chains, task, **changes),
        "--run-dir",
        str(run_dir),
        *options,
    ]
    return [sys.executable, "-m", "rlhfctl", *arguments]


def call(argv: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    out = subprocess.run(argv, capture_output=True, text=True, timeout=240, **options)
    assert "Traceback" not in out.stderr, out.stderr
    return out


def refused(out: "subprocess.CompletedProcess[str]", exit_code: int, sentence: str, run_dir: Path) -> None:
    """Nothing on stdout, the reason on stderr, and at most the report in the run directory."""
    assert (out.returncode, out.stdout) == (exit_code, ""), out.stderr
    assert re.search(sentence, out.stderr), out.stderr
    left = [path.name for path in run_dir.iterdir()] if run_dir.exists() else []
    assert left in ([], ["preflight.json"])


# Refused before the start


def test_a_missing_data_file(chains: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = command(chains, "sft", run_dir, data__train="[{path: nowhere.jsonl}]")
    refused(call(argv, cwd=tmp_path), 5, r"nowhere\.jsonl: no such data file", run_dir)
    report = json.loads((run_dir / "preflight.json").read_text())
    assert (report["status"], report["exit_code"]) == ("refused", 5)
    # A refused run leaves its directory free for the corrected one.
    assert call(command(chains, "sft", run_dir, "--dry-run")).returncode == 0


def test_a_library_that_there_is_not(chains: Path, tmp_path: Path) -> None:
    argv = command(chains, "sft", tmp_path / "run")
    out = call(argv, env={**os.environ, "RLHFCTL_MATMUL": "mlk"})
    refused(
        out, 2, r"RLHFCTL_MATMUL is 'mlk': set it to one of auto, torch, onednn, packed", tmp_path / "run"
    )


def test_empty_data(chains: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    argv = command(chains, "sft", tmp_path / "run", data__train=f"[{{path: {tmp_path}/empty.jsonl}}]")
    refused(call(argv), 5, r"empty\.jsonl is empty", tmp_path / "run")


def test_malformed_rows_are_named_by_number(chains: Path, tmp_path: Path) -> None:
    rows = (chains / "data" / "sft.jsonl").read_text().splitlines(keepends=True)[:20]
    rows[6] = '{"prompt": "1+1?"\n'
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    source = f"[{{path: {tmp_path}/rows.jsonl}}]"
    refused(
        call(command(chains, "sft", tmp_path / "a", data__train=source)),
        5,
        r"row 7: not JSON",
        tmp_path / "a",
    )
    out = call(command(chains, "sft", tmp_path / "b", "-n", data__train=source, data__max_bad_rows="1"))
    assert out.returncode == 0
    assert "1 malformed rows" in out.stderr


def test_a_policy_without_a_chat_template(chains: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(chains / "model", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    changes = {"policy__from_config": str(model), "policy__tokenizer": str(model)}
    refused(call(command(chains, "sft", tmp_path / "run", **changes)), 3, "chat template", tmp_path / "run")


def test_a_context_shorter_than_the_prompt(chains: Path, tmp_path: Path) -> None:
    row = {"question": "1+" * 40 + "1?", "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    argv = command(chains, "ppo", tmp_path / "run", data__train=f"[{{path: {tmp_path}/rows.jsonl}}]")
    refused(call(argv), 5, "do not fit the model's context of 64 tokens", tmp_path / "run")


def test_n_that_does_not_divide_the_batch(chains: Path, tmp_path: Path) -> None:
    argv = command(chains, "ppo", tmp_path / "run", rollout__n="3")
    refused(call(argv), 2, r"rollout\.n \(3\) must divide train\.batch_size \(16\)", tmp_path / "run")


def test_an_absent_model_is_a_finding(chains: Path, tmp_path: Path) -> None:
    argv = command(chains, "ppo", tmp_path / "run", policy="{path: models/absent/here}")
    refused(call(argv), 5, "models/absent/here does not exist", tmp_path / "run")


# Reward functions


def reward(tmp_path: Path, body: str, timeout: float = 3.0) -> str:
    """A recipe's reward section over a function whose first two calls in one process are right."""
    right = "[float(s['response'].endswith('#' + s['label'])) + 0.01 * len(s['response']) for s in samples]"
    source = f"calls = 0\ndef score(samples):\n    import math, time\n    global calls\n    calls += 1\n    {body}\n"
    path = tmp_path / "rewards.py"
    path.write_text(source.replace("RIGHT", right))
    return f"{{sources: [{{kind: python, path: {path}, timeout: {timeout}}}]}}"


BAD = {
    "raises": ("raise KeyError('gold')", "gold"),
    "not a number": ("return [math.nan] * len(samples)", "nan"),
    "wrong length": ("return [0.5]", "1"),
    "hangs": ("time.sleep(100)", "3"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reward_function_is_refused(name: str, chains: Path, tmp_path: Path) -> None:
    body, word = BAD[name]
    out = call(command(chains, "ppo", tmp_path / "run", reward=reward(tmp_path, body)))
    refused(out, 5, rf"(?i)rewards\.score.*{word}", tmp_path / "run")


@pytest.mark.parametrize("name", ["raises", *(pytest.param(n, marks=HEAVY) for n in list(BAD)[1:])])
def test_a_reward_function_that_turns_bad_stops_the_run(name: str, chains: Path, tmp_path: Path) -> None:
    body, word = BAD[name]
    text = f"if calls > 3:\n        {body}\n    return RIGHT"
    out = call(command(chains, "ppo", tmp_path / "run", reward=reward(tmp_path, text)))
    assert (out.returncode, out.stdout.strip()) == (1, str(tmp_path / "run")), out.stderr
    assert re.search(rf"(?i)exception: .*{word}", out.stderr), out.stderr
    assert "resume: " in out.stderr
    run = RunDir(tmp_path / "run")
    assert run.read_status()["state"] == "failed"
    newest = run.newest_checkpoint()
    assert newest is not None
    assert run.checkpoint_step(newest) == 2
    cause = json.loads(run.quarantine.read_text().splitlines()[0])
    assert cause["status"] in ("error", "timeout")
    # Corrected, it goes on from where it was.
    (tmp_path / "rewards.py").write_text((tmp_path / "rewards.py").read_text().replace("calls > 3", "False"))
    again = call([sys.executable, "-m", "rlhfctl", "ppo", "--resume", "--run-dir", str(run.path)])
    assert again.returncode == 0, again.stderr
    assert run.read_status()["state"] == "done"


# A full disk


def last_lines(out: "subprocess.CompletedProcess[str]", run: RunDir) -> None:
    assert out.returncode == 1, out.stderr
    assert re.search(
        r"exception: cannot write the checkpoint .*no space left on the disk.*--resume", out.stderr
    )
    assert run.read_status()["state"] == "failed"
    assert not list(run.checkpoints.glob(".*")), "the half-written checkpoint is gone"


def test_a_file_size_limit_while_checkpointing(chains: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))  # the optimizer's state is larger

    run = RunDir(tmp_path / "run")
    out = call(command(chains, "sft", run.path), preexec_fn=limit)
    last_lines(out, run)
    assert "there is no earlier one" in out.stderr


@pytest.mark.heavy
def test_a_disk_that_fills_up(chains: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        run = RunDir(disk / "run")
        argv = command(chains, "sft", run.path, train__steps="100000", train__save_every="5")
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(process, lambda: run.newest_checkpoint() is not None)
        fill(disk / "filler")
        stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stderr, stderr
        last_lines(subprocess.CompletedProcess(argv, process.returncode, stdout, stderr), run)
        kept = run.newest_checkpoint()
        assert kept is not None
        assert f"{kept.name} is kept" in stderr
        (disk / "filler").unlink()
        steps = run.checkpoint_step(kept) + 3
        resume = [sys.executable, "-m", "rlhfctl", "sft", "--resume", "--run-dir", str(run.path)]
        again = call([*resume, f"train.steps={steps}"])
        assert again.returncode == 0, again.stderr
        assert run.read_status()["step"] == steps
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path) -> None:
    """Take all but a few blocks, so that small files can still be written."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 65536):
            pass
    with open(path, "r+b") as file:
        file.truncate(max(0, path.stat().st_size - 500_000))


# Ctrl-C at any time


def wait_until(process: "subprocess.Popen[str]", condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "delay", [0.0, 0.4, 2.5, *(pytest.param(d, marks=HEAVY) for d in (0.1, 0.8, 1.5, 4.0, 7.0))]
)
def test_ctrl_c_at_any_time(delay: float, chains: Path, tmp_path: Path) -> None:
    """While it checks, loads, rolls out or trains: 130, a sentence, and every logged step is in a checkpoint."""
    run = RunDir(tmp_path / "run")
    python = reward(tmp_path, "return RIGHT")
    argv = command(chains, "ppo", run.path, train__steps="100000", train__save_every="0", reward=python)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, **pipes, text=True, start_new_session=True)
    assert process.stderr is not None
    assert process.stderr.readline() == f"run directory: {run.path}\n"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the reward's process gets it too
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr, stderr
    assert process.returncode == 130, (process.returncode, stderr)
    assert "interrupted" in stderr
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()] if run.metrics.exists() else []
    newest = run.newest_checkpoint()
    if rows:
        assert run.read_status()["state"] == "interrupted"
        assert newest is not None, stderr
        assert run.checkpoint_step(newest) == rows[-1]["step"]
    else:
        assert newest is None


def test_json_holds_one_object_on_failure_too(chains: Path, tmp_path: Path) -> None:
    argv = command(chains, "sft", tmp_path / "run", "--json", data__train="[{path: nowhere.jsonl}]")
    out = call(argv, env={**os.environ, "COLUMNS": "80"})
    result = json.loads(out.stdout)
    assert (out.returncode, result["status"], result["exit_code"]) == (5, "refused", 5)
    assert [finding["id"] for finding in result["findings"] if finding["severity"] == "error"] == ["D001"]
