"""The reward service: many clients of one sample each against one request at a time, and what failures lose.

    python -m benchmarks.serve_rm [--model DIR | --hidden N --layers N] [--tokens N] [--requests N] [--rows N]

JSON lines. serve_rm/alone, serve_rm/clients-N: single-sample requests, a second or more of them, to `rlhfctl
serve-rm`; requests_per_s, latency p50 and p99 in ms, lost (no answer), wrong (an answer that is not this sample's),
`speedup` over one at a time, and `less_cpu`, the same of the service's CPU time. serve_rm/peer-N: a service that
scores one sample a request (serve_rm_peer.py), N clients with a connection for each request. serve_rm/faults,
serve_rm/kills: rows scored by a `kind: remote` source on two servers, with 5 % of the connections cut and with one
server killed again and again; lost counts rows without a score, wrong those with another's. cpu_ms: of the service, a
request. Without --model a small one of the quickstart's size is made here, or one of --hidden and --layers; --tokens
lengthens the responses to about so many tokens; --engine and --dtype are the service's; --rows 0: no failures.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault(
    "DS_ACCELERATOR", "cpu"
)  # deepspeed, where installed, warns on stdout where it must guess
CLIENTS = (16, 64, 500)
PEERS = (1, 16)
FAULTS = 0.05


def make_reward_model(out: Path, hidden: int | None = None, layers: int | None = None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    from rlhfctl.quickstart.chains import write_model

    logging.disable_progress_bar()
    write_model(out)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(out, num_labels=1)
    if hidden is not None:
        config.hidden_size, config.intermediate_size, config.head_dim = hidden, 3 * hidden, 64
        config.num_attention_heads = config.num_key_value_heads = max(1, hidden // 64)
        config.max_position_embeddings = 2048
    if layers is not None:
        config.num_hidden_layers = layers
    AutoModelForSequenceClassification.from_config(config).save_pretrained(out)


def row(n: int, tokens: int = 0) -> dict[str, Any]:
    """A question of the quickstart's task with a chain of four steps; no two are equal. tokens: about so many, by
    saying the chain again."""
    digits = [int(d) for d in f"{n:05d}"]
    steps = "\n".join(f"{a}+{b}={(a + b) % 10}" for a, b in pairwise(digits))
    steps = "\n".join([steps] * max(1, tokens // 24))
    question = [{"role": "user", "content": "+".join(map(str, digits)) + "?"}]
    return {
        "id": f"r{n}",
        "messages": question,
        "response": f"{steps}\n#{sum(digits) % 10}",
        "label": None,
        "metadata": {},
    }


class Service:
    """A `rlhfctl serve-rm` process, or another `command`'s; `again` is one more on the same port."""

    def __init__(
        self, source: Path, port: int = 0, command: list[str] | None = None, options: tuple[str, ...] = ()
    ) -> None:
        ours = ["-m", "rlhfctl", "serve-rm", str(source), "--port", str(port), "-q", *options]
        command = [sys.executable, *(command or ours)]
        self.source, self.options = source, options
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.port = urlsplit(self.url).port or 0

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self) -> "Service":
        return Service(self.source, self.port, options=self.options)


async def client(
    port: int, rows: list[dict[str, Any]], found: dict[str, float], seconds: list[float], fresh: bool
) -> None:
    """One sample a request, each sent when the one before is answered; over one connection, or `fresh` ones. As little
    work as possible: it runs on the same cores as the service."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for place, sample in enumerate(rows):
        if fresh and place:
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"schema": 1, "samples": [sample]}).encode()
        started = time.perf_counter()
        head = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(body) + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        content = json.loads(await reader.readexactly(length))
        seconds.append(time.perf_counter() - started)
        for each in content["rewards"]:
            if each["id"] != sample["id"] or each["id"] in found:
                raise AssertionError(f"{sample['id']} got the answer of {each['id']}")
            found[each["id"]] = each["score"]
    writer.close()


def measure(
    service: Service, clients: int, requests: int, tokens: int = 0, fresh: bool = False
) -> dict[str, Any]:
    rows = [row(n, tokens) for n in range(requests)]
    port, cpu = service.port, service.cpu_seconds()
    found: dict[str, float] = {}
    seconds: list[float] = []

    async def run() -> None:
        shares = [rows[k::clients] for k in range(clients)]
        await asyncio.gather(*(client(port, share, found, seconds, fresh) for share in shares))

    started = time.perf_counter()
    asyncio.run(run())
    wall = time.perf_counter() - started
    seconds.sort()
    return {
        "clients": clients,
        "requests": requests,
        "requests_per_s": round(requests / wall, 1),
        "p50_ms": round(1000 * seconds[len(seconds) // 2], 2),
        "p99_ms": round(1000 * seconds[len(seconds) * 99 // 100], 2),
        "cpu_ms": round(1000 * (service.cpu_seconds() - cpu) / requests, 2),
        "lost": requests - len(found),
        "scores": found,
    }


class Cutting:
    """A forwarder on loopback that cuts a share of the connections, before, within or after the request."""

    def __init__(self, port: int, share: float, seed: int) -> None:
        self.target, self.share, self.draw = port, share, random.Random(seed)
        self.cut = 0
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            threading.Thread(target=self._carry, args=(connection,), daemon=True).start()

    def _carry(self, connection: socket.socket) -> None:
        """Requests of one connection, each with the risk of its own."""
        with connection, socket.create_connection(("127.0.0.1", self.target)) as behind:
            pairs = {connection: behind, behind: connection}
            for here in pairs:
                here.settimeout(0.01)
            while True:
                for here, there in pairs.items():
                    try:
                        data = here.recv(1 << 16)
                    except TimeoutError:
                        continue
                    except OSError:
                        return
                    if not data:
                        return
                    fault = self.draw.random() < self.share / 2  # a request has two directions
                    if fault:
                        self.cut += 1
                        data = data[: self.draw.randrange(len(data))]
                    try:
                        there.sendall(data)
                    except OSError:
                        return
                    if fault:
                        return


def score_all(
    urls: list[str], rows: list[dict[str, Any]], wanted: dict[str, float], **keys: Any
) -> dict[str, Any]:
    from rlhfctl.recipe.sections import RemoteSource
    from rlhfctl.rewards.remote import RemoteReward

    section = {"kind": "remote", "urls": urls, "request_size": 4, "max_in_flight": 16, "retries": 20, **keys}
    source = RemoteReward(RemoteSource.model_validate(section))
    started = time.perf_counter()
    outcomes = source.score(rows)
    wall = time.perf_counter() - started
    source.close()
    pairs = list(zip(rows, outcomes, strict=True))
    off = [o for r, o in pairs if o.score is not None and abs(o.score - wanted[r["id"]]) > 1e-4]
    return {
        "rows": len(rows),
        "rows_per_s": round(len(rows) / wall, 1),
        "lost": sum(outcome.score is None for outcome in outcomes),
        "wrong": len(off),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--engine", default="plain")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or Path(directory) / "rm"
        if options.model is None:
            make_reward_model(model, options.hidden, options.layers)
        given = ("--engine", options.engine, "--dtype", options.dtype)
        services = [Service(model, options=given) for _ in range(2 if options.rows else 1)]
        peer = Service(model, command=["-m", "benchmarks.serve_rm_peer", str(model)])
        try:
            close = 0.03 if options.dtype == "bfloat16" else 1e-4  # between two batches of the same sample
            bench(services, peer, options.requests, options.rows, options.tokens, close)
        finally:
            for service in (*services, peer):
                service.process.terminate()
                service.process.wait()


def bench(
    services: list[Service], peer: Service, requests: int, count: int, tokens: int, close: float
) -> None:
    first = services[0]
    measure(first, 4, 100, tokens)  # warm
    measure(peer, 4, 100, tokens)
    alone = measure(first, 1, max(200, requests // 10), tokens)
    wanted: dict[str, float] = {}
    many = [(f"clients-{n}", measure(first, n, max(requests, 2 * n), tokens)) for n in CLIENTS]
    single = [(f"peer-{n}", measure(peer, n, max(200, requests // 10), tokens, fresh=True)) for n in PEERS]
    results = [("alone", alone), *many, *single]
    for name, result in results:
        scores = result.pop("scores")
        result["wrong"] = sum(
            abs(score - wanted.setdefault(id, score)) > close for id, score in scores.items()
        )
        result["speedup"] = round(result["requests_per_s"] / alone["requests_per_s"], 2)
        result["less_cpu"] = round(alone["cpu_ms"] / max(result["cpu_ms"], 0.01), 2)
        print(json.dumps({"name": f"serve_rm/{name}", **result}), flush=True)

    if not count:
        return
    rows = [row(n, tokens) for n in range(min(count, len(wanted)))]
    cutting = [Cutting(service.port, FAULTS, seed) for seed, service in enumerate(services)]
    result = score_all([each.url for each in cutting], rows, wanted)
    print(
        json.dumps({"name": "serve_rm/faults", **result, "cut": sum(each.cut for each in cutting)}),
        flush=True,
    )

    ended = threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        draw = random.Random(1)
        while not ended.wait(draw.uniform(0.2, 0.6)):
            services[1].kill()
            kills += 1
            services[1] = services[1].again()

    killer = threading.Thread(target=kill)
    killer.start()
    result = score_all([service.url for service in services], rows * 4, wanted)
    ended.set()
    killer.join()
    print(json.dumps({"name": "serve_rm/kills", **result, "kills": kills}), flush=True)


if __name__ == "__main__":
    main()
