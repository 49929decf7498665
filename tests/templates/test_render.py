"""Our engine against transformers' own, over the whole corpus."""

import json
from datetime import datetime
from pathlib import Path

import jinja2
import pytest

from rlhfctl.templates.render import LimitError, RenderError, render

CLOCK = datetime(2025, 1, 15)
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": 'a <b> & "é"', "parameters": {"type": "object"}},
}


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


CONVERSATIONS = [
    [user("hi")],
    [user("hi"), assistant(" there \n")],
    [{"role": "system", "content": "sys"}, user("u"), assistant("a"), user("u2")],
    [user("u"), assistant("<think>\nx\n</think>\n\ny"), user("z"), assistant("<think>q</think>r")],
    [assistant("a"), user("b")],
    [user("a"), user("b")],
    [user([{"type": "text", "text": "hi"}])],
]


@pytest.fixture(scope="module")
def corpus(shared: Path) -> list[tuple[str, str, dict]]:
    folder = shared / "chat-templates"
    entries = json.loads((folder / "index.json").read_text())["templates"]
    return [
        (
            entry["name"],
            (folder / entry["file"]).read_text(encoding="utf-8"),
            {f"{key}_token": value for key, value in entry["tokens"].items() if key != "eot"},
        )
        for entry in entries
    ]


def test_renders_as_transformers_does(corpus: list, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pytest.importorskip("transformers.utils.chat_template_utils")

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Frozen":
            return cls(2025, 1, 15)

    monkeypatch.setattr(engine, "datetime", Frozen)
    compared = 0
    for name, source, tokens in corpus:
        given = {key: value for key, value in tokens.items() if value is not None}
        for messages in CONVERSATIONS:
            for prompt in (False, True):
                for tools in (None, [], [TOOL]):
                    try:
                        theirs = engine.render_jinja_template(
                            [messages],
                            tools=tools,
                            chat_template=source,
                            add_generation_prompt=prompt,
                            **given,
                        )[0][0]
                    except Exception:
                        theirs = None
                    try:
                        ours = render(
                            source, messages, tokens, add_generation_prompt=prompt, tools=tools, clock=CLOCK
                        )
                    except jinja2.TemplateError:
                        ours = None
                    assert ours == theirs, (name, messages, prompt, tools)
                    compared += 1
    assert compared == len(corpus) * len(CONVERSATIONS) * 6


def test_clock_is_pinned_and_runs_otherwise() -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}"
    assert render(source, [], {}, clock=CLOCK) == "2025-01-15"
    assert render(source, [], {}) == datetime.now().strftime("%Y-%m-%d")


def test_generation_tag_renders_its_body() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}"
    assert render(source, [user("a"), user("b")], {}) == "a|b|"


def test_none_tokens_are_undefined_and_kwargs_win() -> None:
    source = "{{ bos_token is defined }} {{ eos_token }} {{ x }}"
    assert render(source, [], {"bos_token": None, "eos_token": "</s>"}, kwargs={"x": 1}) == "False </s> 1"
    assert render("{{ eos_token }}", [], {"eos_token": "a"}, kwargs={"eos_token": "b"}) == "b"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ raise_exception('no system role') }}", jinja2.TemplateError),
        ("{% for", jinja2.TemplateSyntaxError),
        ("{{ a.b.c }}", jinja2.UndefinedError),
        ("{{ 1 + 'a' }}", RenderError),
        ("{{ None | length }}", RenderError),
        ("{{ ''.__class__.__mro__ }}", jinja2.TemplateError),
        ("{{ messages.append(1) }}", jinja2.TemplateError),
        ("{{ 'a' * 1000000000000 }}", LimitError),
        ("{{ 9 ** (9 ** 9) }}", LimitError),
        ("{{ ((9 ** 4000) ** 4000) ** 4000 }}", LimitError),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", LimitError),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaa{% endfor %}{% endfor %}",
            LimitError,
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = 1 %}{% endfor %}{% endfor %}",
            LimitError,
        ),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
            LimitError,
        ),
        (
            "{% set n = namespace(a='aa') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
            LimitError,
        ),
        (
            "{% set n = namespace(a='aa') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
            LimitError,
        ),
        ("{% if a %}" * 3000 + "{% endif %}" * 3000, RenderError),
    ],
)
def test_failures_are_template_errors(source: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        render(source, [], {})


def test_counting_changes_nothing() -> None:
    source = (
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}"
        "{{ loop.previtem.content ~ '<' if loop.previtem is defined }}{% else %}none{% endfor %}"
        "{% for a, b in [(1, 2)] %}{{ a ~ b ~ undefined_name ~ none }}{% endfor %}{% for c in nothing %}x{% endfor %}"
    )
    assert render(source, [user("a"), assistant("b"), user("c")], {}) == "1/2,2/2a<12None"
    assert render(source, [], {}) == "none12None"


def test_message_of_the_template_is_kept() -> None:
    with pytest.raises(jinja2.TemplateError, match=r"^no system role$"):
        render("{{ raise_exception('no system role') }}", [], {})
