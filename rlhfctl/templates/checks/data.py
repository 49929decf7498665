"""Findings that only real conversations can show."""

from collections.abc import Sequence
from contextlib import suppress

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.checks.tokens import CannotEncode, encode
from rlhfctl.templates.probe import Probe
from rlhfctl.templates.render import Message

Rows = Sequence[tuple[str, Sequence[Message]]]
SPECIAL_LIMIT = 10**9  # tokenizer_config writes "no limit" as a number of this size or more


def max_length(probe: Probe) -> int | None:
    """The longest input the side says it takes: model_max_length or the positions of config.json, the smaller."""
    limits = [
        probe.side.tokenizer_config.get("model_max_length"),
        probe.side.text_setting("max_position_embeddings"),
    ]
    usable = [
        int(v)
        for v in limits
        if isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < SPECIAL_LIMIT
    ]
    return min(usable, default=None)


def k017(probe: Probe, rows: Rows) -> Found | None:
    limit, tokenizer = max_length(probe), probe.side.tokenizer
    if limit is None or tokenizer is None:
        return None
    long = []
    for origin, messages in rows:
        text = probe.text(messages)
        with suppress(CannotEncode):
            if text is not None and len(text) > limit and len(encode(tokenizer, text)) > limit:
                long.append(origin)
    if not long:
        return None
    return Found(
        f"{len(long)} rows are longer than {limit} tokens, first {long[0]}",
        {"rows": len(long), "limit": limit},
    )


def p018(probe: Probe, rows: Rows) -> Found | None:
    tokenizer = probe.side.tokenizer
    if tokenizer is None:
        return None
    changed = []
    for origin, messages in rows:
        asked = [
            m["content"] for m in messages if m.get("role") == "user" and isinstance(m.get("content"), str)
        ]
        with suppress(CannotEncode):
            if (
                asked
                and tokenizer.decode(encode(tokenizer, asked[-1]), skip_special_tokens=True) != asked[-1]
            ):
                changed.append(origin)
    if not changed:
        return None
    return Found(f"{len(changed)} of {len(rows)} prompts, first {changed[0]}", {"rows": len(changed)})
