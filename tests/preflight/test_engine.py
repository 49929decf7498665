"""What rollout.engine vllm asks of the machine."""

import importlib.util
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from transformers import LlamaConfig, LlamaModel

from rlhfctl.preflight import engine
from rlhfctl.preflight.engine import head_findings
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.machine import package_findings
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.rollout.engine import within_context

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def inputs(
    chains: Path, model: Path, name: str = "vllm", server: dict[str, object] | None = None, longest: int = 48
) -> Inputs:
    recipe = PpoRecipe.model_validate(
        {
            "task": "ppo",
            "name": "toy",
            "policy": {"from_config": str(model), "tokenizer": str(chains / "model")},
            "data": {"train": [{"path": str(chains / "data/prompts.jsonl")}], "max_length": longest},
            "reward": {"sources": [{"kind": "verifier", "name": "chain_answer"}]},
            "rollout": {"engine": name, "max_new_tokens": 16} | ({"server": server} if server else {}),
            "train": {"steps": 4, "batch_size": 8},
        }
    )
    return Inputs(recipe, None, True)


def sized(chains: Path, out: Path, heads: int) -> Path:
    config = json.loads((chains / "model/config.json").read_text())
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_missing_vllm_is_named_with_its_install_line(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    found: list[Finding] = package_findings(inputs(chains, chains / "model"))
    assert [finding.exit_code for finding in found] == [4]
    assert "rollout.engine vllm" in str(found[0].detail)
    assert "rlhfctl[vllm]" in found[0].fix
    assert "make install-full" in found[0].fix
    assert package_findings(inputs(chains, chains / "model", "hf")) == []
    started = package_findings(inputs(chains, chains / "model", "vllm_server"))
    assert "rollout.engine vllm_server" in str(started[0].detail)
    elsewhere = inputs(chains, chains / "model", "vllm_server", {"urls": ["http://127.0.0.1:1"]})
    assert package_findings(elsewhere) == []


def test_head_sizes_on_a_cpu(chains: Path, tmp_path: Path) -> None:
    found = head_findings(inputs(chains, sized(chains, tmp_path, 4)))
    assert [(finding.id, finding.exit_code) for finding in found] == [("X010", 4)]
    assert "size 16" in found[0].title
    assert head_findings(inputs(chains, sized(chains, tmp_path, 2))) == []
    assert head_findings(inputs(chains, chains / "model", "hf")) == []
    assert head_findings(inputs(chains, sized(chains, tmp_path, 4), "vllm_server"))[0].exit_code == 4
    elsewhere = inputs(chains, sized(chains, tmp_path, 4), "vllm_server", {"urls": ["http://127.0.0.1:1"]})
    assert head_findings(elsewhere) == []


class Answers(BaseHTTPRequestHandler):
    """A rollout server's answers to the handshake."""

    info: ClassVar[dict[str, object]] = {}
    length = 64
    extended = True

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "policy", "max_model_len": self.length}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/collective_rpc":
            self.reply(200, {"results": [self.info]}) if self.extended else self.reply(404, {})
        else:
            self.reply(422, {})

    def reply(self, status: int, answer: object) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    info = {
        "vocabulary": 19,
        "dtype": "float32",
        "device": "cpu",
        "logprobs_mode": "processed_logprobs",
        "chunked_prefill": False,
    }
    monkeypatch.setattr(Answers, "info", info)
    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_given_server_is_asked(chains: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[tuple[str, int, str]]:
        given = inputs(chains, chains / "model", "vllm_server", {"urls": [url]})
        return [(finding.id, finding.exit_code, finding.title) for finding in engine.check(given)]

    assert found() == []
    for name, value, words in (
        ("length", 63, f"{url} takes 63 tokens of prompt and response, this run needs 64"),
        ("extended", False, f"{url} takes no weight updates: start it with VLLM_SERVER_DEV_MODE=1"),
        ("info", Answers.info | {"vocabulary": 32}, f"{url} runs a model of 32 token ids, the policy has 19"),
        ("info", Answers.info | {"logprobs_mode": "raw_logprobs"}, f"{url} gives raw_logprobs"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(Answers, name, value)
            ((number, code, title),) = found()
            assert (number, code) == ("X011", 5)
            assert words in title
    # The model's context is 64: prompts of up to 64 tokens and 16 new ones never come to 80.
    longer = inputs(chains, chains / "model", "vllm_server", {"urls": [url]}, longest=64)
    assert list(engine.check(longer)) == []


def test_an_engine_is_given_at_most_the_models_context() -> None:
    policy = LlamaModel(LlamaConfig(**dict.fromkeys(SIZES, 8), vocab_size=8, max_position_embeddings=64))
    assert [within_context(policy, length) for length in (None, 48, 64, 80)] == [64, 48, 64, 64]


def test_a_given_server_that_is_not_there(chains: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    ((finding),) = engine.check(inputs(chains, chains / "model", "vllm_server", {"urls": [url]}))
    assert (finding.id, finding.exit_code) == ("X011", 5)
    assert f"{url} does not answer" in finding.title


def test_a_port_in_use(chains: Path, tmp_path: Path) -> None:
    model = sized(chains, tmp_path, 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for first, count in ((port, 1), (port - 1, 2)):
            started = inputs(chains, model, "vllm_server", {"port": first, "count": count})
            (finding,) = engine.check(started)
            assert (finding.id, finding.exit_code) == ("X012", 4)
            assert f"port {port} is in use" in finding.title
    assert list(engine.check(inputs(chains, model, "vllm_server", {"port": port}))) == []
