"""template.lock.json: which template a checkpoint was trained with, and what it rendered."""

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.files import read_json
from rlhfctl.templates.probe import Probe
from rlhfctl.templates.render import render
from rlhfctl.templates.sides import load_side

NAME = "template.lock.json"
CLOCK = datetime(2025, 1, 15)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "prompt": ([{"role": "user", "content": "What is 2 + 2?"}], True),
    "chat": (
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "It is 4."},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "It is 6."},
        ],
        False,
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
        True,
    ),
}


def lock_data(template: str, tokens: dict[str, str | None], kwargs: dict[str, Any]) -> dict[str, Any]:
    """renders: by conversation; null where the template refuses."""
    renders: dict[str, str | None] = {}
    for name, (messages, prompt) in CONVERSATIONS.items():
        try:
            renders[name] = render(
                template, messages, tokens, add_generation_prompt=prompt, clock=CLOCK, kwargs=kwargs
            )
        except jinja2.TemplateError:
            renders[name] = None
    return {
        "schema": 1,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "tokens": tokens,
        "template_kwargs": kwargs,
        "renders": renders,
    }


def write_lock(directory: Path, template_kwargs: dict[str, Any]) -> None:
    """Write the lock of the template that lies in `directory`; a directory without a template gets none."""
    side = load_side(directory, template_kwargs=template_kwargs)
    if side.template is not None:
        text = json.dumps(
            lock_data(side.template, side.tokens, template_kwargs), ensure_ascii=False, indent=1
        )
        (directory / NAME).write_text(text + "\n", encoding="utf-8")


def t005(probe: Probe) -> Found | None:
    """The side's template against the lock in its directory, if there is one."""
    side = probe.side
    if side.path is None or side.template is None:
        return None
    lock = read_json(side.path / NAME)
    if lock is None:
        return None
    if lock.get("template_sha256") == hashlib.sha256(side.template.encode()).hexdigest():
        kwargs_same = lock.get("template_kwargs", {}) == side.template_kwargs
        return (
            None
            if kwargs_same
            else Found("same template, other template_kwargs", {"locked": lock.get("template_kwargs")})
        )
    locked = lock.get("renders")
    changed = []
    for name, (messages, prompt) in CONVERSATIONS.items():
        now = probe.text(messages, prompt, clock=CLOCK)
        if not isinstance(locked, dict) or locked.get(name) != now:
            changed.append(name)
    how = f"renders differ for: {', '.join(changed)}" if changed else "the text changed, its renders did not"
    return Found(
        f"{side.source} against {NAME}: {how}", {"changed": changed, "locked": lock.get("template_sha256")}
    )
