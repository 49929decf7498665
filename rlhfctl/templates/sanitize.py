"""Ids of a rendered conversation in which only the template writes control tokens.

A response that spells the reward model's end-of-turn marker would otherwise forge a turn (finding K012). Where content
holds such a string, it is encoded as the plain text it is.
"""

from collections.abc import Callable, Sequence

from jinja2 import TemplateError
from tokenizers import Tokenizer

from rlhfctl.templates.render import Message, Span
from rlhfctl.templates.turns import MARK

Render = Callable[[Sequence[Message]], str]


def encode_sanitized(
    tokenizer: Tokenizer, markers: Sequence[str], render: Render, messages: Sequence[Message], text: str
) -> list[int]:
    """text: the render of `messages`. markers: the added tokens' strings. Equal to plain encoding where no content
    holds a marker."""
    plain = list(tokenizer.encode(text, add_special_tokens=False).ids)
    places = forged_spans(render, messages, text, markers)
    if not places:
        return plain
    special = {
        token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    ids: list[int] = []
    for piece, is_marker in _pieces(text, sorted(special, key=len, reverse=True), places):
        if is_marker:
            ids.append(special[piece])
        else:
            ids += _as_text(tokenizer, piece)
    return ids


def forged_spans(
    render: Render, messages: Sequence[Message], text: str, markers: Sequence[str]
) -> list[Span]:
    """Where the contents that hold a marker stand in the render."""
    spans = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not any(marker in content for marker in markers if marker):
            continue
        try:
            marked = render([*messages[:index], {**message, "content": MARK}, *messages[index + 1 :]])
        except TemplateError:
            continue
        start = marked.find(MARK)
        if start < 0:
            continue
        after = marked[start + len(MARK) :]
        if text.startswith(marked[:start]) and text.endswith(after) and len(text) - len(after) > start:
            spans.append((start, len(text) - len(after)))
    return spans


def _pieces(text: str, special: Sequence[str], plain: Sequence[Span]) -> list[tuple[str, bool]]:
    """The text cut at the special tokens that the template wrote: (piece, whether it is a special token)."""
    pieces: list[tuple[str, bool]] = []
    start = place = 0
    while place < len(text):
        inside = next((end for begin, end in plain if begin <= place < end), None)
        if inside is not None:
            place = inside
            continue
        found = next((marker for marker in special if text.startswith(marker, place)), None)
        if found is None:
            place += 1
            continue
        if place > start:
            pieces.append((text[start:place], False))
        pieces.append((found, True))
        start = place = place + len(found)
    if start < len(text):
        pieces.append((text[start:], False))
    return pieces


def _as_text(tokenizer: Tokenizer, text: str) -> list[int]:
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    finally:
        tokenizer.encode_special_tokens = before
