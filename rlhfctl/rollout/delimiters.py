"""Where reasoning steps end: in a text, and among the tokens that spell it.

A step ends with the first token after which the text since the last border holds a whole delimiter. So borders lie
between tokens: where a tokenizer writes ". The" as "." and " The", the step ends with " The".
"""

from collections.abc import Callable, Sequence

# Tokens of context, beside those of a delimiter, that show how the newest one reads.
TAIL = 8
PART = "\ufffd"  # what tokens decode to that spell a part of a character


class Delimiters:
    """texts: what ends a step, e.g. ("\\n",) or ("\\n", ". ", ".$ "). decode: token ids -> text."""

    def __init__(self, texts: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.texts = tuple(texts)
        self.decode = decode
        # A token is a byte or more.
        self._tail = TAIL + max((len(each.encode()) for each in self.texts), default=0)
        self._may_end: dict[int, bool] = {}

    def end(self, ids: Sequence[int]) -> bool:
        """Whether the last of these tokens completes a delimiter that was not complete before it."""
        if not self._candidate(ids[-1]):
            return False
        tail = list(ids[-self._tail :])
        text, before = self.decode(tail), self.decode(tail[:-1]).rstrip(PART)
        return any(each in text[max(0, len(before) - len(each) + 1) :] for each in self.texts)

    def _candidate(self, token: int) -> bool:
        """Whether the token may hold the last character of a delimiter, or a part of it; most do not, and cost one
        look-up."""
        found = self._may_end.get(token)
        if found is None:
            # Twice, because some tokenizers drop the space that a text starts with.
            text = self.decode([token, token])
            found = self._may_end[token] = PART in text or any(each[-1] in text for each in self.texts)
        return found

    def ends(self, ids: Sequence[int]) -> list[int]:
        """Indices of the tokens that end a step."""
        found: list[int] = []
        start = 0
        for place in range(len(ids)):
            if self.end(ids[start : place + 1]):
                found.append(place)
                start = place + 1
        return found

    def split(self, text: str) -> list[str]:
        """The steps of a text, each without its delimiter; empty ones are none."""
        parts = [text]
        for each in self.texts:
            parts = [piece for part in parts for piece in part.split(each)]
        return [part for part in parts if part.strip()]
