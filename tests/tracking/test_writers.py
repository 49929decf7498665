"""TensorBoard and W&B for real: one run that is stopped and resumed, what its files hold, and what they do not."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.tracking import Wandb, wandb_mode
from rlhfctl.run_dir import RunDir
from rlhfctl.tracking.writers import Writers, run_id, without_credentials

SECRET = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def proxy():
    """(address, connections): every request that leaves this machine would come here first."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(200))

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen


@pytest.mark.heavy
def test_one_run_in_two_attempts(chains: Path, tmp_path: Path, proxy: tuple[str, list[bytes]]) -> None:
    address, connections = proxy
    env = {**os.environ, "HTTP_PROXY": address, "HTTPS_PROXY": address, "WANDB_API_KEY": SECRET}
    keys = {
        "policy.from_config": f"{chains}/model",
        "policy.tokenizer": f"{chains}/model",
        "data.train": f"[{{path: {chains}/data/sft.jsonl}}]",
        "data.eval": "[]",
        "reward": "null",
        "rollout": "null",
        "train.batch_size": 4,
        "train.log_every": 1,
        "tracking": "{tensorboard: true, wandb: {project: chains, mode: offline}}",
    }
    overrides = [f"{key}={value}" for key, value in keys.items()]

    def sft(*words: str) -> None:
        argv = [sys.executable, "-m", "rlhfctl", "sft", *words, "--run-dir", str(tmp_path / "run")]
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "wandb" not in done.stderr  # its chatter would tear the live line

    sft("quickstart/sft", *overrides, "train.steps=2")
    sft("--resume", "train.steps=4")
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(record["step"], pytest.approx(record["loss/sft"])) for record in records]
    assert [step for step, _ in expected] == [1, 2, 3, 4]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/sft")] == expected
    assert {"grad_norm", "lr", "tokens_per_second", "seconds/step"} <= set(events.Tags()["scalars"])

    ids = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    assert ids == {run_id(RunDir(run))}
    stored = b"".join(path.read_bytes() for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")))
    assert stored.count(b"loss/sft") >= 4
    for record in records:
        assert str(record["loss/sft"]).encode()[:9] in stored
    assert connections == []
    for path in run.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_tracker_that_cannot_start_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    """A file stands where its directory should be: true of any failure, network or disk."""
    pytest.importorskip("torch")
    (tmp_path / "tensorboard").write_text("")
    recipe = load_recipe("quickstart/sft", ["tracking.tensorboard=true"]).recipe
    said: list[str] = []
    writers = Writers(recipe, RunDir(tmp_path), said.append)
    for step in (1, 2):
        writers.log(step, {"loss/sft": 1.0})
    writers.close(0)
    assert len(said) == 1
    assert re.match(r"tracking.tensorboard stopped: \w+: .*; metrics.jsonl is complete", said[0])


def test_the_id_is_one_for_all_attempts(tmp_path: Path) -> None:
    first = run_id(RunDir(tmp_path))
    assert first == run_id(RunDir(tmp_path))
    assert re.fullmatch("[0-9a-f]{12}", first)


def test_credentials_in_urls_do_not_leave() -> None:
    recipe = {"reward": {"sources": [{"url": "http://me:pass@host:5000/x"}]}, "n": 1, "at": "a@b"}
    assert without_credentials(recipe) == {
        "reward": {"sources": [{"url": "http://...@host:5000/x"}]},
        "n": 1,
        "at": "a@b",
    }


def test_the_environment_only_takes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    online, offline = Wandb(project="p"), Wandb(project="p", mode="offline")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert (wandb_mode(online), wandb_mode(offline)) == ("online", "offline")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert (wandb_mode(online), wandb_mode(offline)) == ("online", "offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert (wandb_mode(online), wandb_mode(offline)) == ("disabled", "disabled")
