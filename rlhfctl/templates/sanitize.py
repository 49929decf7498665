"""Ids of a rendered conversation in which only the template writes control tokens.

A response that spells the reward model's end-of-turn marker would otherwise forge a turn (finding K012). Where content
holds such a string, it is encoded as the plain text it is.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer

from rlhfctl.templates.render import Message, Span
from rlhfctl.templates.turns import MARK

Render = Callable[[Sequence[Message]], str]


class Sanitizer:
    """A copy of a tokenizer to which control tokens are text, and stand-ins of them are the control tokens.

    The whole text is encoded at once, so that what stands beside a control token is read as it always is: some take in
    the whitespace around them, some tokenizers put a space before the first word of a text. The stand-ins are random:
    no content spells one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        special = {id: token for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        key = secrets.token_hex(8)
        self.stand_ins = {token.content: f"\ue000{key}.{id}\ue000" for id, token in special.items()}
        self.tokenizer.add_tokens(
            [
                AddedToken(
                    self.stand_ins[token.content], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
                )
                for token in special.values()
            ]
        )
        self.ids = {
            self.tokenizer.token_to_id(self.stand_ins[token.content]): id for id, token in special.items()
        }
        self.markers = sorted(self.stand_ins, key=len, reverse=True)

    def encode(self, text: str, forged: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Ids, and the characters of `text` that each stands for. forged: spans in which markers are text."""
        written: list[str] = []
        origin: list[int] = []  # for each character of what is encoded its place in `text`
        for start, end, is_marker in _pieces(text, self.markers, forged):
            piece = self.stand_ins[text[start:end]] if is_marker else text[start:end]
            written.append(piece)
            origin += [start] * len(piece) if is_marker else range(start, end)
        origin.append(len(text))
        encoding = self.tokenizer.encode("".join(written), add_special_tokens=False)
        ids = [self.ids.get(id, id) for id in encoding.ids]
        return ids, [(origin[start], origin[end]) for start, end in encoding.offsets]


def forged_spans(
    render: Render, messages: Sequence[Message], text: str, markers: Sequence[str]
) -> list[Span]:
    """Where the contents that hold a marker stand in `text`, the render of `messages`. markers: the strings of added
    tokens."""
    spans = []
    for index, message in enumerate(messages):
        for content, replaced in _texts(message):
            if not any(marker in content for marker in markers if marker):
                continue
            try:
                marked = render([*messages[:index], replaced, *messages[index + 1 :]])
            except TemplateError:
                continue
            start = marked.find(MARK)
            if start < 0:
                continue
            after = marked[start + len(MARK) :]
            if text.startswith(marked[:start]) and text.endswith(after) and len(text) - len(after) > start:
                spans.append((start, len(text) - len(after)))
    return spans


def _texts(message: Message) -> Iterator[tuple[str, Message]]:
    """Each text of a message's content, and the message with a mark in its place."""
    content: Any = message.get("content")
    if isinstance(content, str):
        yield content, {**message, "content": MARK}
    elif isinstance(content, list):
        for index, part in enumerate(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                parts = [*content[:index], {**part, "text": MARK}, *content[index + 1 :]]
                yield part["text"], {**message, "content": parts}


def _pieces(text: str, markers: Sequence[str], plain: Sequence[Span]) -> Iterator[tuple[int, int, bool]]:
    """The text cut at the markers that the template wrote: (start, end, whether it is a marker). markers: the longest
    first; plain: where they are text."""
    start = place = 0
    while place < len(text):
        inside = next((end for begin, end in plain if begin <= place < end), None)
        if inside is not None:
            place = inside
            continue
        found = next((marker for marker in markers if text.startswith(marker, place)), None)
        if found is None:
            place += 1
            continue
        if place > start:
            yield start, place, False
        yield place, place + len(found), True
        start = place = place + len(found)
    if start < len(text):
        yield start, len(text), False
