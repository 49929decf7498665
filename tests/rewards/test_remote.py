"""A remote reward against servers that are down, slow, wrong or killed: failures are outcomes, never scores."""

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_reward_server import INFO, Answer, Fake

from rlhfctl.errors import Refused, UsageError
from rlhfctl.recipe.sections import RemoteSource
from rlhfctl.rewards.remote import RemoteReward
from rlhfctl.rewards.remote_parts import divide


def scores(body: dict[str, Any]) -> dict[str, Any]:
    """The right answer: each sample's own number."""
    rewards = [
        {"id": each["id"], "status": "ok", "score": float(each["metadata"]["n"])} for each in body["samples"]
    ]
    return {"schema": 1, "rewards": rewards, "model": INFO}


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def make(answer: Answer = lambda fake, body: scores(body), info: Any = INFO) -> Fake:
        made.append(Fake(answer, info))
        return made[-1]

    yield make
    for each in made:
        each.close()


def remote(*servers: Fake | str, **keys: Any) -> RemoteReward:
    urls = [each if isinstance(each, str) else each.url for each in servers]
    return RemoteReward(RemoteSource.model_validate({"kind": "remote", "urls": urls, "retries": 2, **keys}))


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"r{n}", "messages": [], "response": "x", "label": None, "metadata": {"n": n}}
        for n in range(count)
    ]


def test_every_sample_gets_its_own_score_whatever_the_order(fake: Any) -> None:
    def shuffled(fake: Fake, body: dict[str, Any]) -> Any:
        answer = scores(body)
        answer["rewards"].reverse()
        return answer

    server = fake(shuffled)
    source = remote(server, request_size=4)
    assert [each.score for each in source.score(rows(10))] == [float(n) for n in range(10)]
    assert sorted(len(body["samples"]) for body in server.requests) == [2, 4, 4]
    assert source.score([]) == []
    source.close()


def test_the_whole_row_travels(fake: Any) -> None:
    server = fake()
    source = remote(server)
    sample = {
        "id": "a",
        "messages": [{"role": "user", "content": "é?"}],
        "response": "ü\n",
        "label": {"x": [1, None]},
        "metadata": {"n": 1, "day": __import__("datetime").date(2025, 1, 2)},
    }
    assert source.score([sample])[0].score == 1.0
    sent = {**sample, "metadata": {"n": 1, "day": "2025-01-02"}}
    assert server.requests[0] == {"schema": 1, "granularity": "sequence", "samples": [sent]}
    source.close()


def test_samples_of_one_prompt_share_its_id_and_are_not_mixed_up(fake: Any) -> None:
    server = fake()
    source = remote(server)
    samples = [{**row, "id": f"r{n // 4}"} for n, row in enumerate(rows(12))]
    assert [each.score for each in source.score(samples)] == [float(n) for n in range(12)]
    for body in server.requests:
        ids = [each["id"] for each in body["samples"]]
        assert len(ids) == len(set(ids)) == 3
    source.close()


def test_in_flight_requests_are_bounded(fake: Any) -> None:
    def slow(fake: Fake, body: dict[str, Any]) -> Any:
        time.sleep(0.02)
        return scores(body)

    server = fake(slow)
    source = remote(server, request_size=1, max_in_flight=3)
    assert all(each.status == "ok" for each in source.score(rows(24)))
    assert server.most_at_once == 3
    source.close()


def fails_first(times: int, failure: Any) -> Answer:
    """`failure` to the first requests, then right answers."""
    return lambda fake, body: failure if len(fake.requests) <= times else scores(body)


@pytest.mark.parametrize(
    "failure",
    [
        None,
        (500, {}, b"oops"),
        (502, {}, b"<html>"),
        (503, {}, b""),
        (429, {"Retry-After": "0"}, b"slow down"),
        (408, {}, b""),
        (200, {}, b"<html>a proxy's page</html>"),
        (200, {}, b'{"schema": 1, "rewards": ['),
    ],
)
def test_a_transient_failure_is_tried_again(fake: Any, failure: Any) -> None:
    server = fake(fails_first(2, failure))
    source = remote(server)
    assert [each.score for each in source.score(rows(3))] == [0.0, 1.0, 2.0]
    assert len(server.requests) == 3
    source.close()


def test_and_given_up_after_the_tries_that_the_recipe_allows(fake: Any) -> None:
    server = fake(lambda fake, body: (500, {}, b'{"error": {"message": "no memory"}}'))
    source = remote(server, retries=1)
    outcomes = source.score(rows(3))
    assert [(each.status, each.score) for each in outcomes] == [("error", None)] * 3
    assert "HTTP 500: no memory" in str(outcomes[0].error)
    assert len(server.requests) == 2
    source.close()


def test_retry_after_is_waited_for(fake: Any) -> None:
    server = fake(fails_first(1, (429, {"Retry-After": "1"}, b"")))
    source = remote(server)
    started = time.monotonic()
    assert source.score(rows(1))[0].score == 0.0
    assert 1.0 <= time.monotonic() - started < 4.0
    source.close()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 415, 501])
def test_what_is_the_same_the_next_time_is_not_tried_again(fake: Any, status: int) -> None:
    server = fake(lambda fake, body: (status, {}, b"no"))
    source = remote(server)
    outcome = source.score(rows(1))[0]
    assert (outcome.status, outcome.score) == ("error", None)
    assert f"HTTP {status}: no" in str(outcome.error)
    assert len(server.requests) == 1
    source.close()


def test_one_sample_that_the_server_refuses_does_not_take_the_others_with_it(fake: Any) -> None:
    def picky(fake: Fake, body: dict[str, Any]) -> Any:
        bad = any(each["metadata"]["n"] == 5 for each in body["samples"])
        return (422, {}, b"samples.5: no") if bad else scores(body)

    source = remote(fake(picky))
    outcomes = source.score(rows(9))
    assert [each.score for each in outcomes] == [None if n == 5 else float(n) for n in range(9)]
    assert "samples.5: no" in str(outcomes[5].error)
    source.close()


def test_a_slow_server_is_a_timeout(fake: Any) -> None:
    def slow(fake: Fake, body: dict[str, Any]) -> Any:
        time.sleep(1.5)
        return scores(body)

    source = remote(fake(slow), timeout=0.2, total_timeout=1.0, retries=10)
    started = time.monotonic()
    outcomes = source.score(rows(2))
    assert time.monotonic() - started < 3.0
    assert [(each.status, each.score) for each in outcomes] == [("timeout", None)] * 2
    source.close()


def test_so_is_one_that_sends_a_byte_now_and_then(fake: Any) -> None:
    server = fake(lambda fake, body: None)
    handler = server.server.RequestHandlerClass

    def reply(self: Any, given: Any) -> None:
        self.send_response(200)
        content = json.dumps(given).encode() if isinstance(given, dict) else b" " * 50
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for place in range(len(content)):
            self.wfile.write(content[place : place + 1])
            if not isinstance(given, dict):
                time.sleep(0.05)

    handler.reply = reply  # type: ignore[attr-defined]
    source = remote(server, timeout=0.3, total_timeout=0.8)
    started = time.monotonic()
    assert source.score(rows(1))[0].status == "timeout"
    assert time.monotonic() - started < 2.0
    source.close()


def changed(**keys: Any) -> Answer:
    return lambda fake, body: {**scores(body), **keys}


def entry(index: int, **keys: Any) -> Answer:
    """One reward of the answer changed."""

    def answer(fake: Fake, body: dict[str, Any]) -> Any:
        found = scores(body)
        found["rewards"][index] |= keys
        return found

    return answer


@pytest.mark.parametrize(
    ("answer", "statuses", "said"),
    [
        (entry(1, score=math.nan), ["ok", "error", "ok"], "finite"),
        (entry(1, score=math.inf), ["ok", "error", "ok"], "finite"),
        (entry(1, score=None), ["ok", "error", "ok"], "status ok with score None"),
        (entry(1, score="1"), ["ok", "error", "ok"], "score"),
        (entry(1, score="high"), ["ok", "error", "ok"], "score"),
        (entry(1, status="great"), ["ok", "error", "ok"], "status"),
        (entry(1, status="error", error="boom"), ["ok", "error", "ok"], "status error with score"),
        (entry(1, status="timeout", score=None), ["ok", "timeout", "ok"], "timeout"),
        (entry(1, status="missing", score=None, error="no label"), ["ok", "missing", "ok"], "no label"),
        (entry(1, metrics={"m": math.nan}), ["ok", "error", "ok"], "finite"),
        (
            lambda fake, body: {**scores(body), "rewards": scores(body)["rewards"][:2]},
            ["ok", "ok", "missing"],
            "no rew",
        ),
        (changed(rewards=[]), ["missing"] * 3, "no reward for this sample"),
        (entry(1, id="r2"), ["error"] * 3, "two rewards for 'r2'"),
        (entry(1, id="zz"), ["error"] * 3, "'zz', which was not asked"),
        (
            lambda fake, body: {**scores(body), "rewards": scores(body)["rewards"] * 2},
            ["error"] * 3,
            "two rewards for",
        ),
        (changed(rewards={"r0": 1}), ["error"] * 3, "no list of rewards"),
        (changed(rewards=[1, 2, 3]), ["error"] * 3, "None, which was not asked"),
        (changed(schema=2), ["error"] * 3, "schema 2"),
        (changed(model={"fingerprint": "other"}), ["error"] * 3, "its model was exchanged"),
        (changed(model=None), ["error"] * 3, "its model was exchanged"),
        (lambda fake, body: [1.0, 2.0, 3.0], ["error"] * 3, "no list of rewards"),
        (lambda fake, body: (200, {"Content-Encoding": "gzip"}, b"no gzip"), ["error"] * 3, "decompress"),
    ],
)
def test_an_answer_that_breaks_the_protocol(
    fake: Any, answer: Answer, statuses: list[str], said: str
) -> None:
    server = fake(answer)
    source = remote(server)
    outcomes = source.score(rows(3))
    assert [each.status for each in outcomes] == statuses
    assert [each.score is None for each in outcomes] == [status != "ok" for status in statuses]
    errors = [each.error or "" for each in outcomes if each.status != "ok"]
    assert all(said in error for error in errors), errors
    assert len(server.requests) == 1
    source.close()


def test_a_sample_that_is_no_json_fails_alone(fake: Any) -> None:
    samples = rows(4)
    samples[1]["response"] = "half a pair \ud83d"
    samples[2]["metadata"] = {("a", "b"): 1}
    source = remote(fake())
    outcomes = source.score(samples)
    assert [each.status for each in outcomes] == ["ok", "error", "error", "ok"]
    source.close()


def test_another_server_is_asked_at_once_and_the_broken_one_left_alone(fake: Any) -> None:
    broken, sound = fake(lambda fake, body: (500, {}, b"")), fake()
    source = remote(broken, sound, request_size=1, max_in_flight=2)
    started = time.monotonic()
    assert [each.score for each in source.score(rows(40))] == [float(n) for n in range(40)]
    assert time.monotonic() - started < 5.0
    assert len(sound.requests) == 40
    assert len(broken.requests) <= 6
    source.close()


def test_load_is_shared(fake: Any) -> None:
    first, second = fake(), fake()
    source = remote(first, second, request_size=1)
    assert len(source.score(rows(30))) == 30
    assert len(first.requests) == len(second.requests) == 15
    source.close()


def test_handshake_refusals(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfctl.rewards.remote_servers.HANDSHAKE_SECONDS", 2.0)
    gone = fake()
    gone.close()
    with pytest.raises(Refused, match="no reward server answers its handshake"):
        remote(gone)
    for info, said in (
        ({**INFO, "schema": 2}, "speaks schema 2"),
        ({**INFO, "granularities": ["token"]}, "no score for a whole response"),
        (
            {key: value for key, value in INFO.items() if key != "fingerprint"},
            "no usable /v1/info: fingerprint",
        ),
        ([], "no usable /v1/info"),
        (
            (401, {}, b'{"error": {"message": "a bearer token is needed"}}'),
            "HTTP 401: a bearer token is needed",
        ),
        ((404, {}, b""), "HTTP 404"),
    ):
        with pytest.raises(Refused, match=said):
            remote(fake(info=info))
    with pytest.raises(Refused, match="score with different models"):
        remote(fake(), fake(info={**INFO, "fingerprint": "0" * 64}))
    with pytest.raises(UsageError, match="NOT_SET_ANYWHERE"):
        remote(fake(), api_key_env="NOT_SET_ANYWHERE")
    for key in ("schl\u00fcssel", "two\nlines"):
        monkeypatch.setenv("RM_KEY", key)
        with pytest.raises(UsageError, match="RM_KEY holds characters that no HTTP header can carry"):
            remote(fake(), api_key_env="RM_KEY")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:port", "Port could not be cast"),
        ("http://127.0.0.1:99999", "Port out of range"),
        ("http://[::1", "Invalid IPv6 URL"),
        (f"http://{'a' * 70}.x:1", "label"),
        ("http://", "names no host"),
        ("http://two words:1", "names no host"),
    ],
)
def test_an_address_that_nobody_could_connect_to(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"is no address of a reward service: .*{said}"):
        RemoteSource(kind="remote", url=url)
    RemoteSource(kind="remote", urls=["http://[::1]:5000/rm", "https://b\u00fccher.example"])


def test_one_of_two_servers_may_be_down_at_the_start(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfctl.rewards.remote_servers.HANDSHAKE_SECONDS", 2.0)
    gone, there = fake(), fake()
    gone.close()
    source = remote(gone, there)
    assert list(source.silent) == [gone.url]
    assert [each.score for each in source.score(rows(3))] == [0.0, 1.0, 2.0]
    source.close()


def test_requests_respect_the_limits_of_the_server() -> None:
    parts = list(divide([(n, b"x" * 60) for n in range(5)], [str(n) for n in range(5)], 3, 250))
    assert [[place for place, _ in part] for part in parts] == [[0, 1], [2, 3], [4]]
    huge = list(divide([(0, b"x" * 999), (1, b"x")], ["a", "b"], 32, 250))
    assert [[place for place, _ in part] for part in huge] == [[0], [1]]
