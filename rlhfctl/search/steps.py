"""Where steps end: in a text, and among the tokens that spell it.

A step ends with the first token after which the text since the last border holds a whole delimiter. So borders lie
between tokens: where a tokenizer writes ". The" as "." and " The", the step ends with " The".
"""

from collections.abc import Callable, Sequence

# Tokens of context that show how the newest one reads: no character takes more in a byte-level vocabulary.
TAIL = 8


def split_text(text: str, delimiters: Sequence[str]) -> list[str]:
    """The steps of a text, each without its delimiter; empty ones are none."""
    parts = [text]
    for delimiter in delimiters:
        parts = [piece for part in parts for piece in part.split(delimiter)]
    return [part for part in parts if part.strip()]


def ends_step(ids: Sequence[int], delimiters: Sequence[str], decode: Callable[[list[int]], str]) -> bool:
    """Whether the last of these tokens completes a delimiter that was not complete before it."""
    tail = list(ids[-TAIL:])
    text, before = decode(tail), decode(tail[:-1])
    return any(delimiter in text[max(0, len(before) - len(delimiter) + 1) :] for delimiter in delimiters)


def step_ends(ids: Sequence[int], delimiters: Sequence[str], decode: Callable[[list[int]], str]) -> list[int]:
    """Indices of the tokens that end a step."""
    return [place for place in range(len(ids)) if ends_step(ids[: place + 1], delimiters, decode)]
