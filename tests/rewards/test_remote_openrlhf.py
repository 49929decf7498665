"""protocol openrlhf: a client of OpenRLHF's form, against our own service and against servers that speak it badly."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError

from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import RemoteSource, Reward
from rlhfctl.rewards.build import build_sources
from rlhfctl.rewards.match import Matcher, answers_to
from rlhfctl.rewards.remote_openrlhf import OpenRlhfReward
from rlhfctl.serving.app import create_app
from rlhfctl.serving.matching import Rows
from rlhfctl.serving.scorers import open_served

RULES = """
def reward_func(queries, prompts, labels):
    if any("poison" in query for query in queries):
        raise ValueError("poison")
    right = [query[len(prompt):] == str(label) for query, prompt, label in zip(queries, prompts, labels)]
    return {"rewards": [float(each) for each in right], "extra_logs": {"length": [len(query) for query in queries]}}
"""
Reply = Callable[[dict[str, Any]], Any]


class Served:
    """An app on loopback, in a thread of this process."""

    def __init__(self, app: FastAPI) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


class Bare:
    """A server written without care: `reply` makes the answer of a request, a JSON value or a Response."""

    def __init__(self) -> None:
        self.reply: Reply = numbers
        self.asked: list[dict[str, Any]] = []
        app = FastAPI()

        @app.post("/get_reward")
        async def get_reward(request: Request) -> Any:
            body = json.loads(await request.body())
            self.asked.append(body)
            given = self.reply(body)
            return (
                given
                if isinstance(given, Response)
                else Response(json.dumps(given), media_type="application/json")
            )

        self.served = Served(app)
        self.url = self.served.url


@pytest.fixture(scope="module")
def running() -> Iterator[Bare]:
    bare = Bare()
    yield bare
    bare.served.close()


@pytest.fixture
def bare(running: Bare) -> Bare:
    running.reply = numbers
    running.asked.clear()
    return running


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """serve-rm with rules, that finds rows of a file by their prompt."""
    home = tmp_path_factory.mktemp("rules")
    (home / "rules.py").write_text(RULES)
    rows = [{"id": f"r{n}", "prompt": f"{n} +  1?", "label": str(n + 1)} for n in range(20)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = open_served(str(home / "rules.py"))
    service = Served(create_app(served, rows=Rows(str(home / "rows.jsonl"), "normalised")))
    yield service.url
    service.close()


def number(query: str) -> float:
    return float(query.split()[-1])


def numbers(body: dict[str, Any]) -> Any:
    return {"rewards": [number(query) for query in body["query"]]}


def row(n: int, response: str | None = None, prompt: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt or "count"}]
    return {
        "id": f"r{n}",
        "messages": messages,
        "response": response or f" {n}",
        "label": str(n),
        "metadata": {},
    }


def remote(url: str | None, reward: dict[str, Any] | None = None, **keys: Any) -> OpenRlhfReward:
    section = {"kind": "remote", "protocol": "openrlhf", "url": url, "retries": 1, **keys}
    source = build_sources(Reward.model_validate({"sources": [section], **(reward or {})}))[0]
    assert isinstance(source, OpenRlhfReward)
    return source


def ask(source: OpenRlhfReward, samples: list[dict[str, Any]]) -> list[Any]:
    try:
        return source.score(samples)
    finally:
        source.close()


def test_our_own_service_scores_each_query_and_finds_its_row(ours: str) -> None:
    samples = [row(n, str(n + n % 2), f"{n} + 1?") for n in range(20)]
    for sample in samples:
        sample["label"] = None  # the service has it
    outcomes = ask(remote(ours, request_size=3), samples)
    assert [outcome.score for outcome in outcomes] == [float(n % 2) for n in range(20)]
    assert outcomes[0].metrics == {"length": 8.0}  # the row's own prompt


def test_one_query_that_it_cannot_score_costs_the_others_nothing(ours: str) -> None:
    samples = [{**row(n, str(n + 1), f"{n} + 1?"), "label": str(n + 1)} for n in range(8)]
    samples[5]["response"] = "poison"
    samples[6]["messages"] = [{"role": "user", "content": "of no row"}]
    outcomes = ask(remote(ours, retries=0), samples)
    assert [outcome.score for outcome in outcomes] == [1.0] * 5 + [None, None, 1.0]
    assert "poison" in outcomes[5].error
    assert "the prompt of no row" in outcomes[6].error


def test_query_prompts_and_labels_travel_in_order(bare: Bare) -> None:
    outcomes = ask(
        remote(bare.url + "/get_reward", request_size=4, max_in_flight=1), [row(n) for n in range(9)]
    )
    assert [outcome.score for outcome in outcomes] == [float(n) for n in range(9)]
    assert [len(body["query"]) for body in bare.asked] == [4, 4, 1]
    assert bare.asked[2] == {"query": ["count 8"], "prompts": ["count"], "labels": ["8"]}


def test_samples_of_one_text_are_asked_one_by_one(bare: Bare) -> None:
    outcomes = ask(remote(bare.url), [row(1), row(2), row(1), row(1)])
    assert [outcome.score for outcome in outcomes] == [1.0, 2.0, 1.0, 1.0]
    assert all(len(set(body["query"])) == len(body["query"]) for body in bare.asked)


def test_rendered_queries_are_in_the_policys_template(bare: Bare, chains: Path, tmp_path: Path) -> None:
    from rlhfctl.templates.encode import ChatEncoder

    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]")
    encoder = ChatEncoder.from_path(chains / "model", template)
    section = RemoteSource(kind="remote", protocol="openrlhf", url=bare.url, query="rendered")
    source = OpenRlhfReward(section, Reward(sources=[section]), encoder)
    sample = row(3, prompt="3+8?")
    assert ask(source, [sample])[0].score == 3.0
    rendered = "[user]3+8?[assistant]"
    assert bare.asked == [{"query": [rendered + " 3"], "prompts": [rendered], "labels": ["3"]}]


def nan(body: dict[str, Any]) -> Response:
    rewards = ", ".join(
        "NaN" if n == 1 else "1e999" if n == 2 else "0.5" for n, _ in enumerate(body["query"])
    )
    return Response(f'{{"rewards": [{rewards}]}}', media_type="application/json")


@pytest.mark.parametrize(
    ("reply", "scores", "said"),
    [
        (nan, [0.5, None, None, 0.5], "a reward must be a finite number, not nan"),
        (lambda body: {"rewards": [1, None, True, "2"]}, [1.0, None, None, None], "null instead of a reward"),
        (lambda body: {"scores": [1, 2, 3, 4]}, [1.0, 2.0, 3.0, 4.0], ""),
        (lambda body: {"rewards": [1, 2, 3]}, [None] * 4, "has 3 rewards for 4 queries"),
        (lambda body: {"rewards": [1, 2, 3, 4, 5]}, [None] * 4, "has 5 rewards for 4 queries"),
        (lambda body: {"rewards": 1.0}, [None] * 4, "holds no list of rewards"),
        (lambda body: [1, 2, 3, 4], [None] * 4, "holds no list of rewards"),
        (lambda body: {"rewards": [1, 10**400, 3, 4]}, [1.0, None, 3.0, 4.0], "finite number, not 1000"),
        (lambda body: {"rewards": [[1], [2], [3], [4]]}, [None] * 4, "finite number, not [1]"),
        (lambda body: Response("<html>", media_type="text/html"), [None] * 4, "is not JSON"),
        (lambda body: Response("{}", 404), [None] * 4, "HTTP 404"),
        (lambda body: Response("no", 429, {"Retry-After": "0"}), [None] * 4, "HTTP 429: no"),
        (
            lambda body: {"rewards": [1, 2, 3, 4], "extra_logs": {"short": [1], "odd": "x"}},
            [1.0, 2.0, 3.0, 4.0],
            "",
        ),
    ],
)  # fmt: skip
def test_what_a_careless_server_answers(bare: Bare, reply: Reply, scores: list[Any], said: str) -> None:
    bare.reply = reply
    outcomes = ask(remote(bare.url), [row(n) for n in range(4)])
    assert [outcome.score for outcome in outcomes] == scores
    assert all((outcome.status == "ok") == (outcome.score is not None) for outcome in outcomes)
    errors = [outcome.error for outcome in outcomes if outcome.error]
    assert said in (errors or [""])[0]


def test_a_slow_server_is_a_timeout_and_a_dead_one_is_refused_before_training(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.reply = lambda body: time.sleep(0.6) or numbers(body)
    outcome = ask(remote(bare.url, timeout=0.2, retries=0), [row(1)])[0]
    assert (outcome.status, outcome.score) == ("timeout", None)
    with monkeypatch.context() as patch:
        patch.setattr("rlhfctl.rewards.remote_servers.HANDSHAKE_SECONDS", 0.2)
        with pytest.raises(Refused, match=r"no reward server answers: http://127\.0\.0\.1:9/get_reward"):
            remote("http://127.0.0.1:9", retries=0)
    both = remote(None, urls=["http://127.0.0.1:9", bare.url], retries=1)
    assert list(both.silent) == ["http://127.0.0.1:9/get_reward"]
    both.close()


def shuffled(change: Callable[[str], str]) -> Reply:
    def reply(body: dict[str, Any]) -> Any:
        named = list(reversed(body["query"]))
        return {"rewards": [number(query) for query in named], "query": [change(query) for query in named]}

    return reply


LOSSY: dict[str, Callable[[str], str]] = {
    "ends": lambda text: f"<s>{text}</s>",
    "lower": lambda text: text.lower().replace("  ", " "),
    "damaged": lambda text: text.replace("ï", "\ufffd"),
    "wrong": lambda text: text.replace("1", "7"),
}


@pytest.mark.parametrize(
    ("loss", "finds"),
    [
        ("ends", ("exact", "normalised", "fuzzy")),
        ("lower", ("normalised", "fuzzy")),
        ("damaged", ("fuzzy",)),
        ("wrong", ()),
    ],
)
@pytest.mark.parametrize("match", ["exact", "normalised", "fuzzy"])
def test_answers_in_another_order_are_found_by_their_text(
    bare: Bare, match: Any, loss: str, finds: tuple[str, ...]
) -> None:
    bare.reply = shuffled(LOSSY[loss])
    samples = [row(n, prompt="A naïve  question of NASA and another word") for n in (10, 11, 12)]
    source = remote(bare.url, {"match": match, "match_threshold": 0.0})
    outcomes = ask(source, samples)
    if match in finds:
        assert [outcome.score for outcome in outcomes] == [10.0, 11.0, 12.0]
        assert [outcome.metrics["match_rate"] for outcome in outcomes] == [1.0] * 3
    else:
        assert [outcome.status for outcome in outcomes] == ["missing"] * 3
        assert [outcome.metrics["match_rate"] for outcome in outcomes] == [0.0] * 3
        assert f"reward.match {match}" in outcomes[0].error


def test_below_the_threshold_no_answer_is_used(bare: Bare) -> None:
    one_wrong = shuffled(lambda text: text.replace("12", "13"))
    samples = [row(n) for n in (10, 11, 12, 14)]
    bare.reply = one_wrong
    kept = ask(remote(bare.url, {"match": "fuzzy", "match_threshold": 0.75}), samples)
    assert [outcome.score for outcome in kept] == [10.0, 11.0, None, 14.0]
    refused = ask(remote(bare.url, {"match": "fuzzy"}), samples)
    assert [outcome.status for outcome in refused] == ["error"] * 4
    assert "3 of 4 answers were matched, reward.match_threshold is 1" in refused[0].error
    assert [outcome.metrics for outcome in refused] == [{"match_rate": float(n != 2)} for n in range(4)]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (numbers, "does not say in `query`"),
        (lambda body: {"rewards": [1, 2], "query": [body["query"][0]] * 2}, "two rewards for one query"),
        (lambda body: {"rewards": [1], "query": [5]}, "no reward of the answer has a `query`"),
        (lambda body: {"rewards": [], "query": []}, "the answer is empty"),
    ],
)
def test_an_answer_that_names_its_queries_badly(bare: Bare, reply: Reply, said: str) -> None:
    bare.reply = reply
    outcomes = ask(remote(bare.url, {"match": "normalised", "match_threshold": 0.0}), [row(1), row(2)])
    assert [outcome.score for outcome in outcomes] == [None, None]
    assert said in outcomes[1].error


def test_numbers_and_negations_are_never_alike() -> None:
    queries = ["is 12+30 even?", "is 13+30 even?", "it is n't", "it is"]
    for mode in ("exact", "normalised", "fuzzy"):
        matcher = Matcher(queries, fuzzy=mode == "fuzzy")
        assert [answers_to(matcher, text, mode) for text in queries] == [0, 1, 2, 3]
        assert answers_to(matcher, "is 14+30 even?", mode) is None


@pytest.mark.parametrize(
    ("reward", "source", "said"),
    [
        ({"match": "fuzzy"}, {}, "reward.match is ignored here: it belongs to a remote source with protocol openrlhf"),
        ({"match_threshold": 0.5}, {"protocol": "openrlhf"}, "reward.match_threshold is ignored here"),
        ({}, {"query": "rendered"}, "reward.sources.0.query is ignored here: it belongs to protocol openrlhf"),
        ({}, {"protocol": "openrlhf", "fingerprint": "f"}, "sources.0.fingerprint is ignored here"),
        ({}, {"protocol": "openrlhf", "span_weight": 1.0}, "sources.0.span_weight is ignored here"),
    ],
)  # fmt: skip
def test_keys_that_would_change_nothing(reward: dict[str, Any], source: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Reward.model_validate({"sources": [{"kind": "remote", "url": "http://x", **source}], **reward})
