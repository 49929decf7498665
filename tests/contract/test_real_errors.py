"""What goes wrong outside of rlhfctl, met for real where that can be done here: one sentence, with what to do."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.errors import RunFailed, Unable
from rlhfctl.stop import StopRequest
from rlhfctl.worker import CUDA_TROUBLE, explain


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """A hub that answers as the real one does: a status and a code in a header, by the owner's name."""
    answers = {"gated": (403, "GatedRepo"), "absent": (404, "RepoNotFound"), "busy": (503, "")}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = answers[next(name for name in answers if f"/{name}/" in self.path)]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def small_hub(chains: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with one model, and what was asked of it."""
    commit, asked = "0" * 40, []
    files = {path.name: path.read_bytes() for path in (chains / "model").iterdir()}
    files["model.safetensors"] = b"weights"

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            asked.append(name)
            body = files.get(name)
            if "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": each, "size": len(files[each]), "oid": each} for each in files
                ]
                body = json.dumps(tree).encode()
            elif self.path.startswith("/api/models/some/model"):
                siblings = [{"rfilename": each} for each in files]
                body = json.dumps({"id": "some/model", "sha": commit, "siblings": siblings}).encode()
            self.send_response(404 if body is None else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(body or b"").hexdigest()}"')
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_template_is_looked_at_without_its_weights(
    small_hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = small_hub
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
    argv = [sys.executable, "-m", "rlhfctl", "inspect-template", "some/model", "--json"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    told = json.loads(done.stdout)
    assert "policy" in told, (told, asked)
    assert told["policy"]["name"] == "some/model"
    assert "tokenizer_config.json" in asked
    assert "model.safetensors" not in asked
    again = subprocess.run(
        argv, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, cwd=tmp_path
    )
    assert json.loads(again.stdout)["policy"] == told["policy"]


def dry_run(endpoint: str, model: str, tmp_path: Path) -> dict[str, Any]:
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
    words = ["sft", "qwen/sft-0.5b", f"policy.path={model}", "--dry-run", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhfctl", *words],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    (found,) = [finding for finding in told["findings"] if finding["id"] == "W002"]
    return dict(found)


@pytest.mark.parametrize(
    ("owner", "cause", "fix"),
    [
        (
            "gated",
            "gated/model is gated",
            "accept them at https://huggingface.co/gated/model, then set HF_TOKEN",
        ),
        ("absent", "the hub has no absent/model, or it is private", "check the spelling"),
    ],
)
def test_models_that_the_hub_does_not_give(
    hub: str, tmp_path: Path, owner: str, cause: str, fix: str
) -> None:
    found = dry_run(hub, f"{owner}/model", tmp_path)
    assert cause in found["detail"]
    assert fix in found["fix"]


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # free again below: nobody listens
    found = dry_run(f"http://127.0.0.1:{port}", "some/model", tmp_path)
    assert found["detail"] == "the hub cannot be reached"
    assert "HTTPS_PROXY" in found["fix"]


def explained(error: BaseException) -> tuple[type, str]:
    known = explain(error, StopRequest(inline=True))
    assert known is not None
    return type(known), known.message


def test_memory_that_this_machine_does_not_have() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    kind, sentence = explained(error.value)
    assert kind is RunFailed
    assert sentence.startswith("this machine ran out of memory: lower train.tokens_per_microbatch")
    kind, sentence = explained(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert sentence.startswith("the GPU ran out of memory: lower train.tokens_per_microbatch")


def test_cuda_that_does_not_fit() -> None:
    """The first is what this torch says for real on a machine without a GPU; the others are their libraries' words."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)) as error:
            torch.empty(1, device="cuda")
        kind, sentence = explained(error.value)
        assert kind is Unable
        assert "rlhfctl doctor" in sentence
    for said in CUDA_TROUBLE:
        assert explained(RuntimeError(f"CUDA error: {said} for execution on the device"))[0] is Unable


def test_a_signal_is_told_before_its_consequences() -> None:
    stop = StopRequest(inline=True)
    stop.deferred = True
    stop.signum = signal.SIGTERM
    known = explain(RuntimeError("CUDA error: no kernel image is available"), stop)
    assert known is not None
    assert known.exit_code == 143


def test_a_model_without_a_tokenizer_and_a_number_format_that_is_none(chains: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((chains / "model/config.json").read_text())
    words = [
        "sft",
        "quickstart/sft",
        f"policy.from_config={tmp_path}/model",
        f"policy.tokenizer={tmp_path}/model",
    ]
    argv = [sys.executable, "-m", "rlhfctl", *words, "--dry-run", "--json"]
    told = json.loads(subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path).stdout)
    (found,) = [finding for finding in told["findings"] if finding["id"] == "T000"]
    assert found["title"] == "the policy has no tokenizer"
    assert (
        told["exit_code"] == 3
    )  # without a tokenizer there is no chat template either, and a mismatch comes first
    assert "tokenizer.json" in found["fix"]
    wrong = subprocess.run([*argv, "policy.dtype=float16"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "policy.dtype must be one of auto, float32, bfloat16" in json.loads(wrong.stdout)["message"]
