"""What a service answers to right and to wrong requests; after each of the wrong ones it still works."""

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

Row = Callable[..., dict[str, Any]]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def still_works(service: Any, sample: Row) -> Any:
    yield
    answer = service.ask(sample(n=7))
    assert (answer.status_code, answer.json()["rewards"][0]["score"]) == (200, 7.0)


def test_scores_carry_the_ids_metrics_and_the_hash_of_the_text(service: Any, sample: Row) -> None:
    answer = service.ask(sample("b", n=2), sample("a", "x", n=-1.5)).json()
    assert answer["schema"] == 1
    assert [(each["id"], each["status"], each["score"]) for each in answer["rewards"]] == [
        ("b", "ok", 2.0),
        ("a", "ok", -1.5),
    ]
    assert answer["rewards"][1]["text_sha256"].startswith("2d711642b726b044")  # sha256 of "x"
    assert answer["rewards"][0]["metrics"] == {"batch": 2.0}
    assert answer["model"] == {
        name: service.started["info"][name] for name in ("name", "kind", "fingerprint", "version")
    }


def test_a_failed_sample_has_no_score_and_leaves_the_others_theirs(service: Any, sample: Row) -> None:
    rewards = service.ask(sample("a", n=1), sample("b", **{"raise": True}), sample("c", none=1)).json()[
        "rewards"
    ]
    assert [(each["status"], each["score"]) for each in rewards] == [
        ("ok", 1.0),
        ("error", None),
        ("missing", None),
    ]
    assert "ValueError: asked to" in rewards[1]["error"]


def test_spans_are_given_where_the_rules_give_them_and_missed_where_they_were_asked_for(
    service: Any, sample: Row
) -> None:
    spans = [{"start": 0, "end": 2, "score": 0.5}]
    rewards = service.ask(sample("a", n=1, spans=spans), sample("b", n=1), granularity="step").json()[
        "rewards"
    ]
    assert rewards[0]["spans"] == spans
    assert (rewards[1]["status"], rewards[1]["score"]) == ("missing", None)
    assert "no spans" in rewards[1]["error"]


def test_an_empty_response_has_no_spans_to_miss(service: Any, sample: Row) -> None:
    """Nor could rules give any: a span has characters."""
    empty = [{**sample(name, n=2), "response": text} for name, text in (("a", ""), ("b", " \n"))]
    rewards = service.ask(*empty, granularity="step").json()["rewards"]
    assert [(each["status"], each["score"], each["spans"]) for each in rewards] == [("ok", 2.0, [])] * 2


GOOD = {"id": "a", "messages": [{"role": "user", "content": "x"}], "response": "y"}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"samples": []}, 422, "samples"),
        ({"samples": [GOOD], "smples": 1}, 422, "smples"),
        ({"samples": [{**GOOD, "score": 1}]}, 422, "samples.0.score"),
        ({"samples": [GOOD, {**GOOD, "id": 7}]}, 422, "samples.1.id"),
        ({"samples": [GOOD, GOOD]}, 422, "samples.1.id"),
        ({"samples": [{**GOOD, "messages": "hello"}]}, 422, "samples.0.messages"),
        ({"samples": [{**GOOD, "messages": [{"content": "x"}]}]}, 422, "samples.0.messages.0.role"),
        ({"samples": [{**GOOD, "response": None}]}, 422, "samples.0.response"),
        ({"samples": [{**GOOD, "metadata": []}]}, 422, "samples.0.metadata"),
        ({"samples": [GOOD], "granularity": "word"}, 422, "granularity"),
        ({"samples": [GOOD], "schema": 2}, 422, "schema"),
        ({"samples": [{**GOOD, "id": str(n)} for n in range(4097)]}, 422, "samples"),
        ([GOOD], 422, ""),
        ("hello", 422, ""),
    ],
)
def test_a_wrong_request_is_told_its_field(service: Any, body: Any, status: int, field: str) -> None:
    answer = service.post("/v1/rewards", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert [each["field"] for each in error["fields"]] == [field]
    assert field in error["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"query": "x"}, "query"),
        ({"prompts": ["x"]}, "query"),
        ({"query": ["xy"], "prompts": ["x", "y"]}, "prompts"),
        ({"query": ["xy"], "prompts": ["z"]}, "query.0"),
        ({"query": ["xy"], "labels": []}, "labels"),
        ({"query": ["xy"], "promts": ["x"]}, "promts"),
    ],
)
def test_so_is_one_in_the_form_of_openrlhf(service: Any, body: Any, field: str) -> None:
    answer = service.post("/get_reward", json=body)
    assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, field)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x00\xff\xfe",
        b"{'a': 1}",
        b'{"samples": [',
        b"[" * 100_000,
        b'{"a": "\\ud800"}',
        b"1e999999",
    ],
)
def test_garbage_is_a_400_or_422(service: Any, content: bytes) -> None:
    answer = service.post("/v1/rewards", content=content, headers=JSON)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_another_content_type_path_or_method(service: Any) -> None:
    assert service.post("/v1/rewards", data={"a": "b"}).status_code == 415
    assert service.post("/v2/rewards", json={}).status_code == 404
    assert httpx.get(f"{service.url}/v1/rewards").status_code == 405


def test_a_body_of_100_mb_is_refused_and_not_kept(service: Any) -> None:
    answer = service.post("/v1/rewards", content=b" " * 100_000_000, headers=JSON)
    assert answer.status_code == 413
    assert "larger than 33554432 bytes" in answer.json()["error"]["message"]
    resident = next(
        int(line.split()[1])
        for line in open(f"/proc/{service.process.pid}/status")  # noqa: SIM115
        if line.startswith("VmHWM")
    )
    assert resident < 400_000  # kB; the process has some 80 MB of its own


def test_so_is_one_without_a_length(service: Any) -> None:
    parts = (b" " * 1_000_000 for _ in range(40))
    assert service.post("/v1/rewards", content=parts, headers=JSON).status_code == 413


def test_half_a_request_and_a_client_that_leaves(service: Any, sample: Row) -> None:
    at = urlsplit(service.url)
    body = json.dumps({"samples": [sample(sleep=0.3)]}).encode()
    head = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    for sent in (
        b"POST /v1/rew",
        head[:40],
        head % len(body),
        head % len(body) + body[:20],
        head % len(body) + body,
    ):
        with socket.create_connection((at.hostname, at.port)) as connection:
            connection.sendall(sent)
    with socket.create_connection((at.hostname, at.port)) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 what TLS says first\r\n\r\n")
        assert b"400" in connection.recv(100)


def test_health_info_and_metrics(service: Any) -> None:
    assert httpx.get(f"{service.url}/health").json() == {"status": "ok"}
    info = httpx.get(f"{service.url}/v1/info").json()
    assert (info["schema"], info["kind"], info["name"]) == (1, "rules", "rules.score")
    assert info["granularities"] == ["sequence", "step", "token"]
    assert len(info["fingerprint"]) == 64
    before = service.metric('rlhfctl_requests_total{code="200",path="/health"}')
    httpx.get(f"{service.url}/health")
    assert service.metric('rlhfctl_requests_total{code="200",path="/health"}') == before + 1
    assert service.metric('rlhfctl_samples_total{status="ok"}') > 0
    assert service.metric("rlhfctl_batch_samples_count") > 0
    assert service.metric("rlhfctl_waiting_samples") == 0
