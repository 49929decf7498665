"""A rollout server without vLLM: its protocol over HTTP, a policy's own weights behind it, and faults on demand."""

import contextlib
import copy
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.models import attention
from rlhfctl.models.load import prepare
from rlhfctl.rollout import weight_files
from rlhfctl.rollout.canary import trainer_logprobs

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def random_policy(seed):
    attention.register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=attention.NAME)
    return prepare(model, torch.device("cpu"))


@pytest.fixture
def policy():
    return random_policy(0)


class Server:
    """Samples are a function of the prompt and the seed alone. fault(path, body, number): called before the request
    `number` is answered; it may sleep, change the answer it gets back as a dictionary, or raise ConnectionError."""

    def __init__(self, policy, port=0):
        self.policy = copy.deepcopy(policy)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.normal_()
        self.version = "default"
        self.asked = []
        self.info = {
            "vocabulary": policy.config.vocab_size,
            "dtype": "float32",
            "logprobs_mode": "processed_logprobs",
            "chunked_prefill": False,
            "device": "cpu",
        }
        self.length = 128
        self.fault = lambda path, body, number: {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.reply(200, {"data": [{"id": "policy", "max_model_len": outer.length}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
                try:
                    status, answer = outer.answer(self.path.split("?")[0], body)
                except (
                    ConnectionError,
                    FileNotFoundError,
                ):  # the second: weights of a sync that was given up
                    self.close_connection = True
                    return
                self.reply(status, answer)

            def reply(self, status, answer):
                content = json.dumps(answer).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_):
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path, body):
        if path == "/inference/v1/generate" and not body:
            return 422, {"error": "no token ids"}
        self.asked.append((path, body))
        changed = self.fault(path, body, len(self.asked))
        if "status" in changed:
            return changed["status"], {"error": {"message": "asked for by a test"}}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {}
        if path == "/collective_rpc":
            return 200, {"results": [getattr(self, body["method"])(*body.get("args", []))]}
        return 200, self.generate(body) | changed

    def sync_info(self):
        return self.info

    def sync_files(self, directory, tensors):
        own = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, tensor in weight_files.read(directory, tensors):
                own[name].copy_(tensor)
        return {"error": None}

    def generate(self, body):
        ids, params = body["token_ids"], body["sampling_params"]
        choices = [self.choice(ids, params, k) for k in range(params.get("n", 1))]
        scores = None
        if "prompt_logprobs" in params:
            found = trainer_logprobs(self.policy, ids).tolist()
            scores = [None, *({str(token): {"logprob": v}} for token, v in zip(ids[1:], found, strict=True))]
        return {"choices": choices, "prompt_logprobs": scores}

    def choice(self, ids, params, k):
        drawn = random.Random(f"{ids} {params.get('seed', 0) + k}")
        tokens = [
            drawn.randrange(self.info["vocabulary"]) for _ in range(drawn.randint(1, params["max_tokens"]))
        ]
        told = [{"token_id": token, "logprob": -drawn.random()} for token in tokens]
        return {
            "index": k,
            "token_ids": tokens,
            "finish_reason": "length" if len(tokens) == params["max_tokens"] else "stop",
            "logprobs": {"content": told},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
        }


@pytest.fixture
def make_server():
    """make_server(policy): one that runs until the test ends."""
    made = []

    def make(policy):
        made.append(Server(policy))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def servers(policy, make_server):
    """Two of them, each with weights of its own until its first sync."""
    return [make_server(policy), make_server(policy)]
