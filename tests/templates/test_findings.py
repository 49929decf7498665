"""Findings that the corpus does not show: sources, locks, list content, GGUF, data, and that no id is dead."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.errors import UsageError
from rlhfctl.templates.catalogue import ENTRIES
from rlhfctl.templates.checks import pair
from rlhfctl.templates.inspect import SIDE_CHECKS, Options, Report, inspect
from rlhfctl.templates.lock import NAME, write_lock
from rlhfctl.templates.sides import Side, load_side
from rlhfctl.templates.traits import traits

CLOCK = datetime(2025, 1, 15)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def found(report: Report, id: str, side: str = "policy") -> Any:
    return next((f for f in report.findings if (f.id, f.side) == (id, side)), None)


@pytest.fixture
def stories(shared: Path, tmp_path: Path) -> Path:
    """A copy of a real model's tokenizer files."""
    directory = tmp_path / "stories"
    directory.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        shutil.copyfile(shared / "models" / "stories260k" / file, directory / file)
    return directory


def test_every_id_has_a_check() -> None:
    assert {*SIDE_CHECKS, *pair.CHECKS, "K017", "P018"} == set(ENTRIES)


def test_sources_that_disagree(stories: Path) -> None:
    template = json.loads((stories / "tokenizer_config.json").read_text())["chat_template"]
    (stories / "chat_template.jinja").write_text(template + "{# a comment #}")
    assert found(inspect(load_side(stories)), "T004").severity == "warning"
    (stories / "chat_template.jinja").write_text(template + "!")
    report = inspect(load_side(stories))
    assert found(report, "T004").severity == "error"
    assert "transformers uses chat_template.jinja" in found(report, "T004").detail
    assert report.policy["template_source"] == "chat_template.jinja"


def test_additional_templates_follow_transformers(stories: Path) -> None:
    (stories / "additional_chat_templates").mkdir()
    (stories / "additional_chat_templates" / "rag.jinja").write_text("x")
    side = load_side(stories)
    assert side.template is None
    assert "rag" in side.problem
    (stories / "chat_template.jinja").write_text(CHATML)
    assert load_side(stories).template == CHATML


def test_lock_of_a_checkpoint(stories: Path, tmp_path: Path) -> None:
    write_lock(stories, {})
    lock = json.loads((stories / NAME).read_text())
    assert lock["renders"]["prompt"].endswith("Assistant:")
    assert found(inspect(load_side(stories)), "T005") is None
    (tmp_path / "other.jinja").write_text(CHATML)
    report = inspect(load_side(stories, tmp_path / "other.jinja"))
    assert found(report, "T005").evidence["changed"] == ["prompt", "chat", "system"]
    changed_kwargs = load_side(stories, template_kwargs={"enable_thinking": False})
    assert "template_kwargs" in found(inspect(changed_kwargs), "T005").detail


def test_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_bytes(CHATML.replace("{% endfor %}", "\r\n{% endfor %}").encode() + b"\n")
    assert found(inspect(load_side(file)), "T009").evidence["seen"] == ["CRLF", "a final newline"]


def test_list_content(tmp_path: Path) -> None:
    """Findings on a template that wants parts are made on parts, and the bridge wraps for a reward model."""
    parts = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    (tmp_path / "parts.jinja").write_text(parts)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    tokens = {"bos": None, "eos": "</s>", "pad": None}
    rm = load_side(tmp_path / "parts.jinja", tokens=tokens)
    policy = load_side(tmp_path / "chatml.jinja", tokens={"eos": "<|im_end|>"})
    alone = inspect(rm)
    assert found(alone, "T007").severity == "error"
    assert found(alone, "T036") is None
    report = inspect(policy, rm, Options(bridge=True))
    assert report.bridge["mode"] == "re-render+list-content"
    assert found(report, "T007", "rm").handled
    assert report.exit_code == 0


def test_own_template_kwargs(bare_side: Callable[[str], Side]) -> None:
    policy, rm = bare_side("exaone-4"), bare_side("smollm3-3b")
    assert found(inspect(policy), "T026") is not None
    policy.template_kwargs = {"enable_thinking": False}
    report = inspect(policy, rm, Options(clock=CLOCK, bridge=True))
    assert found(report, "P014", "pair").handled
    assert found(report, "T026") is None  # it is set
    policy.template_kwargs = {"enable_thinking": True}
    assert (
        found(inspect(policy, rm, Options(clock=CLOCK)), "P014", "pair") is None
    )  # what smollm3 does anyway


def test_reward_token(shared: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers" / "gpt2" / file, tmp_path / file)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["additional_reward_token"] = "<|reward|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = shared / "chat-templates" / "chatml.jinja"
    report = inspect(load_side(tmp_path, template), load_side(tmp_path, template), Options(bridge=True))
    assert found(report, "P015", "pair").evidence == {"token": "<|reward|>"}
    assert found(report, "P015", "pair").handled


def test_data_longer_than_the_reward_model(shared: Path) -> None:
    side = load_side(shared / "models" / "stories260k")
    rows = [
        ("d.jsonl:1", [{"role": "user", "content": "a b"}]),
        ("d.jsonl:2", [{"role": "user", "content": "a b " * 999}]),
    ]
    report = inspect(side, side, Options(conversations=rows))
    assert found(report, "K017", "rm").detail.endswith("first d.jsonl:2")
    assert found(report, "K017", "rm").severity == "error"
    assert found(report, "P018", "pair") is None


def test_traits() -> None:
    def of(*messages: dict[str, Any]) -> set[str]:
        return set(traits([("row", messages)]).found)

    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert of(question, answer) == set()
    assert of({"role": "system", "content": "s"}, question) == {"system"}
    assert of(question, question) == {"repeated_roles"}
    assert of(answer, question) == {"repeated_roles"}
    assert of(question, answer, question, answer) == {"several_answers"}
    assert of(question, {"role": "assistant", "content": "<think>x</think>y"}) == {"reasoning"}
    assert of(question, {"role": "assistant", "content": None, "tool_calls": []}) == {"tools"}
    assert of({"role": "critic", "content": " x"}) == {"unknown_roles", "outer_whitespace"}


def test_gguf(gguf: Callable[[Path, dict[str, Any]], Path], tmp_path: Path) -> None:
    file = gguf(
        tmp_path / "m.gguf",
        {
            "tokenizer.ggml.tokens": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": CHATML,
        },
    )
    report = inspect(load_side(file))
    assert report.policy["tokens"] == {"bos_token": "<s>", "eos_token": "</s>"}
    assert {"K002", "K003", "K005"} <= {f.id for f in report.findings}
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:60])
    with pytest.raises(UsageError, match="is not a readable GGUF file"):
        load_side(tmp_path / "cut.gguf")


def test_a_named_template_settles_which_one(stories: Path, tmp_path: Path) -> None:
    (stories / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert found(inspect(load_side(stories)), "T004") is not None
    assert found(inspect(load_side(stories, tmp_path / "mine.jinja")), "T004") is None
