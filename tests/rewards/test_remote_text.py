"""What a remote reward model says of a response and of the text it read, against the response and the text here."""

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_reward_server import INFO, Fake

from rlhfctl.recipe.sections import RemoteSource, Template
from rlhfctl.rewards.remote import RemoteReward
from rlhfctl.serving.protocol import Granularity
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.render import render

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eot_token }}{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
TIMED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + TEMPLATE
TOKENS = {"bos_token": "<s>", "eot_token": "</turn>"}


def model_info(template: str) -> dict[str, Any]:
    shown = {"sha256": hashlib.sha256(template.encode()).hexdigest(), "text": template, "tokens": TOKENS}
    return {**INFO, "kind": "model", "granularities": ["sequence", "step", "token"], "template": shown}


Serve = Callable[..., Fake]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(reward, info): a server that gives reward(sample) for each sample, beside id and status."""
    made: list[Fake] = []

    def make(reward: Callable[[dict[str, Any]], dict[str, Any]], info: dict[str, Any]) -> Fake:
        def answer(fake: Fake, body: dict[str, Any]) -> Any:
            found = [{"id": s["id"], "status": "ok", "score": 1.0, **reward(s)} for s in body["samples"]]
            return {"schema": 1, "rewards": found, "model": info}

        made.append(Fake(answer, info))
        return made[-1]

    yield make
    for each in made:
        each.close()


def source(server: Fake, granularity: Granularity = "sequence", **given: Any) -> RemoteReward:
    section = {"kind": "remote", "url": server.url, "retries": 0, "request_size": 2}
    if granularity != "sequence":
        section["span_weight"] = 1.0
    return RemoteReward(RemoteSource.model_validate(section), granularity=granularity, **given)


def rows(*responses: str, **more: Any) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": "two plus two?"}]
    return [
        {"id": f"r{n}", "messages": messages, "response": text, "label": None, "metadata": {}, **more}
        for n, text in enumerate(responses)
    ]


@pytest.fixture
def opens(shared: Path) -> ChatEncoder:
    """A policy whose prompts open a reasoning block."""
    template = shared / "chat-templates/deepseek-r1-distill-qwen-32b.jinja"
    return ChatEncoder.from_path(shared / "tokenizers/qwen2", template)


def spans_of(response: str, separator: str) -> list[dict[str, Any]]:
    """One a part of the text that the server got, its score the part's place."""
    found, start = [], 0
    for part in response.split(separator):
        found.append({"start": start, "end": start + len(part), "score": float(len(found))})
        start += len(part) + len(separator)
    return found


def test_spans_are_those_of_the_response_that_the_policy_wrote(serve: Serve, opens: ChatEncoder) -> None:
    """Also where its prompt opened the reasoning block, which the server reads in front of it."""
    got: list[str] = []

    def wrong(sample: dict[str, Any]) -> dict[str, Any]:
        got.append(sample["response"])
        start = sample["response"].index("WRONG")
        return {"spans": [{"start": start, "end": start + 5, "score": -1.0}]}

    remote = source(serve(wrong, model_info(TEMPLATE)), "token", policy=opens)
    responses = ["two\n</think>\nIt is WRONG. ok", "<think>\nno</think> WRONG", "WRONG"]
    outcomes = remote.score(rows(*responses))
    remote.close()
    assert sorted(got) == sorted([f"<think>\n{responses[0]}", responses[1], f"<think>\n{responses[2]}"])
    for response, outcome in zip(responses, outcomes, strict=True):
        assert [response[span.start : span.end] for span in outcome.spans] == ["WRONG"]


def test_scores_of_what_the_prompt_opened_stay_before_the_first_character(
    serve: Serve, opens: ChatEncoder
) -> None:
    """The sum over tokens stays what it was."""
    server = serve(lambda s: {"spans": spans_of(s["response"], " ")}, model_info(TEMPLATE))
    remote = source(server, "token", policy=opens)
    [outcome] = remote.score(rows("two plus"))
    assert [(s.start, s.end, s.score) for s in outcome.spans] == [(0, 3, 0.0), (4, 8, 1.0)]
    remote.close()
    server = serve(lambda s: {"spans": spans_of(s["response"], "\n")}, model_info(TEMPLATE))
    remote = source(server, "token", policy=opens)
    [outcome] = remote.score(rows("two\nplus"))
    assert [(s.start, s.end, s.score) for s in outcome.spans] == [(0, 0, 0.0), (0, 3, 1.0), (4, 8, 2.0)]
    remote.close()


def test_a_step_that_the_prompt_opened_is_no_step_of_the_policy(serve: Serve, opens: ChatEncoder) -> None:
    server = serve(lambda s: {"spans": spans_of(s["response"], "\n")}, model_info(TEMPLATE))
    remote = source(server, "step", policy=opens)
    outcomes = remote.score(rows("two\nplus", "<think>\nfour"))
    remote.close()
    assert [(s.start, s.end, s.score) for s in outcomes[0].spans] == [(0, 3, 1.0), (4, 8, 2.0)]
    assert [(s.start, s.end, s.score) for s in outcomes[1].spans] == [(0, 7, 0.0), (8, 12, 1.0)]


def test_where_the_policy_wrote_no_step_the_score_has_a_place(serve: Serve, opens: ChatEncoder) -> None:
    reward = {"score": -2.0, "spans": [{"start": 0, "end": 7, "score": -2.0}]}
    remote = source(serve(lambda sample: reward, model_info(TEMPLATE)), "step", policy=opens)
    [outcome] = remote.score(rows(" \n"))
    remote.close()
    assert [(s.start, s.end, s.score) for s in outcome.spans] == [(0, 2, -2.0)]


@pytest.mark.parametrize("granularity", ["sequence", "step"])
def test_a_step_that_the_prompt_opened_is_not_the_score_either(
    serve: Serve, opens: ChatEncoder, granularity: Granularity
) -> None:
    """It would be every answer's, where it is the lowest step. A score of another kind stays."""

    def reward(sample: dict[str, Any]) -> dict[str, Any]:
        spans = spans_of(sample["response"], "\n")
        return {"spans": spans, "score": 7.0 if "other" in sample["response"] else 0.0}

    info = {**model_info(TEMPLATE), "granularities": ["sequence", "step"]}
    remote = source(serve(reward, info), granularity, policy=opens)
    outcomes = remote.score(rows("two\nplus", "<think>\nfour", "other\nkind"))
    remote.close()
    assert [outcome.score for outcome in outcomes] == [1.0, 0.0, 7.0]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"score": "1.5"}, "score: "),
        ({"score": True}, "score: "),
        ({"score": 10**400}, "score: "),
        ({"spans": [{"start": 0, "end": 999, "score": 1.0}]}, "spans.0: [0, 999) is no part of the response (0 to 5)"),
        ({"spans": [{"start": 5, "end": 1, "score": 1.0}]}, "spans.0: [5, 1) is no part of the response (0 to 5)"),
        ({"spans": [{"start": -1, "end": 1, "score": 1.0}]}, "spans.0.start: "),
        ({"spans": [{"start": 0.5, "end": 1, "score": 1.0}]}, "spans.0.start: "),
        ({"spans": [{"start": False, "end": True, "score": 1.0}]}, "spans.0.start: "),
        ({"spans": [{"start": 0, "end": 1, "score": "1"}]}, "spans.0.score: "),
    ],
)  # fmt: skip
def test_a_value_that_is_none(serve: Serve, reward: dict[str, Any], said: str) -> None:
    remote = source(serve(lambda sample: reward, {**INFO, "granularities": ["sequence", "token"]}), "token")
    [outcome] = remote.score(rows("hello"))
    remote.close()
    assert (outcome.status, outcome.score, outcome.spans) == ("error", None, [])
    assert f"the answer's reward is not usable: {said}" in str(outcome.error)


def test_whole_numbers_and_spans_at_the_edges_are_sound(serve: Serve) -> None:
    spans = [{"start": 0, "end": 5, "score": 2}, {"start": 5, "end": 5, "score": 0}]
    reward = {"score": 2, "spans": spans}
    remote = source(serve(lambda sample: reward, {**INFO, "granularities": ["sequence", "token"]}), "token")
    [outcome] = remote.score(rows("hello"))
    remote.close()
    assert outcome.score == 2.0
    assert [(span.start, span.end, span.score) for span in outcome.spans] == [(0, 5, 2.0), (5, 5, 0.0)]


def conversation(sample: dict[str, Any], as_parts: bool = False) -> list[dict[str, Any]]:
    turns = [*sample["messages"], {"role": "assistant", "content": sample["response"]}]
    if as_parts:
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return turns


def hash_of(text: str) -> dict[str, Any]:
    return {"text_sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("template", "days"), [(TEMPLATE, 0), (PARTS, 0), (DATED, 0), (DATED, -1), (DATED, 1), (TIMED, 5)]
)
def test_the_text_that_a_server_scored_is_the_one_rendered_here(
    serve: Serve, opens: ChatEncoder, template: str, days: int
) -> None:
    """A date may be that of another time zone; a time of day cannot be known here."""

    def reward(sample: dict[str, Any]) -> dict[str, Any]:
        turns = conversation(sample, template == PARTS)
        return hash_of(render(template, turns, TOKENS, clock=datetime.now() + timedelta(days)))

    remote = source(serve(reward, model_info(template)), policy=opens, template=Template(fold_system=True))
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 \u00fc?"}]
    outcomes = remote.score([*rows("4", "<think>\n5", ""), *rows("\n6 \n", messages=system)])
    remote.close()
    assert [outcome.status for outcome in outcomes] == ["ok"] * 4


@pytest.mark.parametrize(
    "found",
    [
        lambda sample: {"text_sha256": "0" * 64},
        lambda sample: hash_of(render(TEMPLATE, conversation(sample), {**TOKENS, "bos_token": ""})),
        lambda sample: hash_of(render(TEMPLATE, conversation(sample)[1:], TOKENS)),
    ],
)
def test_another_text_is_refused(serve: Serve, found: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    remote = source(serve(found, model_info(TEMPLATE)))
    for _ in range(2):  # a refusal lasts
        outcomes = remote.score(rows("4", "5"))
        assert [(outcome.status, outcome.score) for outcome in outcomes] == [("error", None)] * 2
        assert "scored another text than its own template makes of the sample 'r0' (text_sha256" in str(
            outcomes[0].error
        )
    remote.close()


@pytest.mark.parametrize("first", ["4", "5"])
def test_the_first_batch_decides(serve: Serve, first: str) -> None:
    """Where it was right the later ones are not compared; one that was not is never forgotten."""

    def reward(sample: dict[str, Any]) -> dict[str, Any]:
        text = render(TEMPLATE, conversation(sample), TOKENS)
        return hash_of(text if sample["response"] == "4" else "")

    remote = source(serve(reward, model_info(TEMPLATE)))
    assert remote.score(rows(first))[0].status == ("ok" if first == "4" else "error")
    later = ["ok"] * 4 if first == "4" else ["ok", "ok", "error", "error"]
    for _ in range(2):
        assert [outcome.status for outcome in remote.score(rows("4", "4", "5", "4"))] == later
    remote.close()


@pytest.mark.parametrize(
    "info",
    [
        {**INFO, "granularities": ["sequence"]},
        {**model_info(TEMPLATE), "template": None},
        model_info("{{ raise_exception('never') }}"),
    ],
)
def test_where_the_text_cannot_be_made_here_nothing_is_compared(serve: Serve, info: dict[str, Any]) -> None:
    remote = source(serve(lambda sample: {"text_sha256": "0" * 64}, json.loads(json.dumps(info))))
    assert [outcome.status for outcome in remote.score(rows("4"))] == ["ok"]
    remote.close()
    remote = source(serve(lambda sample: {}, model_info(TEMPLATE)))  # and a server that tells no hash
    assert [outcome.status for outcome in remote.score(rows("4"))] == ["ok"]
    remote.close()
