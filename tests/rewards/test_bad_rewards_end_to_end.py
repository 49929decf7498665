"""What a user sees of a reward function or of data that cannot be used: an exit code and a sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfctl.quickstart.chains import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": str((i + 1) % 10)}) + "\n" for i in range(8))
    )
    return tmp_path / "model"


def rlhfctl(task: str, model: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run of a few tiny steps in a directory of its own, on the quickstart's untrained model."""
    home = model.parent
    command = [sys.executable, "-m", "rlhfctl", task, f"quickstart/{task}", "--run-dir", str(home / "run")]
    origin = [f"policy={{from_config: {model}, tokenizer: {model}}}", "data.eval=[]"]
    steps = ["train.steps=6", "train.batch_size=8", "train.eval_every=0", "train.log_every=1"]
    data = [f"data.train=[{{path: {home / 'data.jsonl'}}}]"]
    return subprocess.run(
        [*command, *origin, *data, *steps, *overrides], capture_output=True, text=True, cwd=home
    )


def refused(done: subprocess.CompletedProcess[str], sentence: str, home: Path) -> None:
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("raise KeyError('x')", "failed on"),
        ("return [float('nan')] * len(samples)", "returned a number that is not finite: nan"),
        ("return [0.5]", "returned 1 scores for"),
        ("return [0.5] * len(samples)", "gave 0.5 to all"),
        ("__import__('time').sleep(600)", "no answer after 1 s"),
        ("__import__('os')._exit(9)", "ended with exit code 9"),
    ],
)
def test_bad_function_is_refused_before_anything_starts(model: Path, body: str, sentence: str) -> None:
    path = model.parent / "r.py"
    path.write_text(f"def score(samples):\n    {body}\n")
    done = rlhfctl("ppo", model, f"reward.sources=[{{kind: python, path: {path}, timeout: 1}}]")
    refused(done, sentence, model.parent)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such data file"),
        ("", "is empty: it holds no rows"),
        (
            '{"question": "1+1?", "answer": "2"}\n{"question": \n',
            "row 2: not JSON (Expecting value at column 14)",
        ),
        ('{"prompt": "1?", "chosen": "#1", "rejected": "#2"}\n', "these are preference pairs"),
    ],
)
def test_bad_data_is_refused(model: Path, content: str | None, sentence: str) -> None:
    path = model.parent / "data.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    refused(rlhfctl("ppo", model), sentence, model.parent)


BREAKS_LATER = """
calls = 0
def score(samples):
    global calls
    calls += 1
    if calls > 3 and samples[0]["id"]:
        raise ValueError("the service is gone")
    return [len(set(s["response"])) / 10 for s in samples]
"""


def test_a_function_that_breaks_in_mid_run_stops_it_and_nothing_is_lost(model: Path) -> None:
    path = model.parent / "r.py"
    path.write_text(BREAKS_LATER)
    (model.parent / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1?"}}\n' for i in range(8)))
    done = rlhfctl("ppo", model, f"reward.sources=[{{kind: python, path: {path}}}]")
    assert done.returncode == 1
    assert "ValueError: the service is gone (line 7)" in done.stderr
    assert "Traceback" not in done.stderr
    run = model.parent / "run"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    failed_step = records[0]["step"]
    assert failed_step == steps[-1] + 1
    assert len(records) == 8
    assert {record["status"] for record in records} == {"error"}
    assert all(set(r["sample"]) == {"id", "messages", "response", "label", "metadata"} for r in records)
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
