"""Clients that stall: in the headers, in the body, or with headers without end. Others are answered meanwhile."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from rlhfctl.serving import body, headers
from rlhfctl.serving.app import create_app
from rlhfctl.serving.scorers import open_served
from rlhfctl.serving.server import bind, settings

POST = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def address(rules: Path) -> Iterator[tuple[str, int]]:
    opened = bind("127.0.0.1", 0)
    server = uvicorn.Server(settings(create_app(open_served(str(rules)))))
    thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield opened.getsockname()
    server.should_exit = True
    thread.join(20)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "SECONDS", 0.5)
    monkeypatch.setattr(body, "SECONDS", 0.5)


def ended(connection: socket.socket) -> bytes:
    """All that the server still says until it hangs up."""
    connection.settimeout(20)
    said = b""
    while part := connection.recv(1 << 16):
        said += part
    return said


def whole(connection: socket.socket) -> bytes:
    """One answer, up to the end of its JSON object; less where the server hangs up."""
    connection.settimeout(20)
    said = b""
    while not said.endswith(b"}") and (part := connection.recv(1 << 16)):
        said += part
    return said


def ok(connection: socket.socket) -> bool:
    return whole(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", b"HTTP/1.1 408"),
        (b"POST /v1/rew", b"HTTP/1.1 408"),
        (POST, b"HTTP/1.1 408"),
        (POST + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 1000) for n in range(80)), b"HTTP/1.1 431"),
        (
            GET.removesuffix(b"\r\n") + b"X: %s\r\n\r\n" % (b"y" * 70_000),
            b"HTTP/1.1 431",
        ),  # they end: too large
    ],
)
def test_headers_that_do_not_end(address: tuple[str, int], sent: bytes, said: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(sent)
        assert ended(connection).startswith(said)


def test_nor_those_of_a_second_request(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(GET)
        assert ok(connection)
        connection.sendall(POST)
        assert ended(connection).startswith(b"HTTP/1.1 408")


def test_a_byte_now_and_then_does_not_help(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(POST + b"X: ")
            while time.monotonic() < began + 10:
                connection.sendall(b"y")
                time.sleep(0.02)
        assert 0.4 < time.monotonic() - began < 10


def test_a_body_that_stalls_is_a_408(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(POST + b'Content-Length: 500\r\n\r\n{"samples": [')
        answer = whole(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body did not arrive within" in answer


def test_an_idle_connection_between_requests_is_kept(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        for _ in range(2):
            connection.sendall(GET)
            assert ok(connection)
            time.sleep(0.8)


def test_a_slow_score_is_no_stalled_request(address: tuple[str, int], sample: Any) -> None:
    url = f"http://{address[0]}:{address[1]}/v1/rewards"
    answer = httpx.post(url, json={"samples": [sample(sleep=1.2, n=3)]}, timeout=30)
    assert [each["score"] for each in answer.json()["rewards"]] == [3.0]


def test_others_are_answered_while_many_stall(address: tuple[str, int], sample: Any) -> None:
    url = f"http://{address[0]}:{address[1]}/v1/rewards"
    stalled = [socket.create_connection(address) for _ in range(200)]
    try:
        for connection in stalled:
            connection.sendall(POST)
        content = json.dumps({"samples": [sample(n=5)]})
        answer = httpx.post(url, content=content, headers={"Content-Type": "application/json"}, timeout=30)
        assert [each["score"] for each in answer.json()["rewards"]] == [5.0]
        assert all(b"408" in ended(connection) for connection in stalled)
    finally:
        for connection in stalled:
            connection.close()


def test_a_client_that_leaves_while_it_waits_is_noticed(address: tuple[str, int], sample: Any) -> None:
    content = json.dumps({"samples": [sample(sleep=1.0)]}).encode()
    with socket.create_connection(address) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        time.sleep(0.1)
    ends = time.monotonic() + 10
    counted = 'rlhfctl_requests_total{code="499",path="/v1/rewards"} 1.0'
    while counted not in httpx.get(f"http://{address[0]}:{address[1]}/metrics").text:
        assert time.monotonic() < ends
        time.sleep(0.05)
