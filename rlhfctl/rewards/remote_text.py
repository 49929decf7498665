"""The text that a remote reward model has to have read, rendered here through the template of its handshake.

A server whose text_sha256 is of another text scores something else than it says it does. It renders messages as the
bridge does that has no policy and no options (templates/bridge.py), so nothing but the template decides the text, and
no tokenizer is needed.
"""

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

from jinja2 import TemplateError
from pydantic import ValidationError

from rlhfctl.rewards.remote_messages import holds
from rlhfctl.serving.protocol import Info, Sample
from rlhfctl.templates.adapt import wrap_content
from rlhfctl.templates.probe import U1, assistant, user
from rlhfctl.templates.render import render

Hashes = Callable[[bytes], frozenset[str]]


def text_hashes(info: Info) -> Hashes | None:
    """From a sample as it travels to the hashes that its text may have; none where it cannot be rendered here.

    None for rules, and for a model that does not tell its template."""
    if info.kind != "model" or info.template is None:
        return None
    shown = info.template
    turns = [user(), assistant()]
    wraps = not holds(shown, turns, U1) and holds(shown, wrap_content(turns), U1)

    def hashes(row: bytes) -> frozenset[str]:
        try:
            sample = Sample.model_validate_json(row)
            messages = [message.model_dump(exclude_unset=True) for message in sample.messages]
            messages.append({"role": "assistant", "content": sample.response})
            messages = wrap_content(messages) if wraps else messages
            texts = dated(partial(render, shown.text, messages, shown.tokens))
        except (TemplateError, ValidationError):
            return frozenset()
        return frozenset(hashlib.sha256(text.encode()).hexdigest() for text in texts)

    return hashes


def dated(render_at: Callable[..., str]) -> set[str]:
    """The render; of a template that writes the date those of three days, for a server of another time zone. None of
    one that writes the time of day."""
    now = datetime.now()
    texts = {render_at(clock=now + timedelta(days)) for days in (-1, 0, 1)}
    later = now.replace(hour=(now.hour + 13) % 24, minute=(now.minute + 7) % 60, second=(now.second + 7) % 60)
    return texts if render_at(clock=later) in texts else set()
