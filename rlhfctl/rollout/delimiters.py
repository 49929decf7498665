"""Where reasoning steps end: in a text, and among the tokens that spell it.

A step ends with the first token after which the text since the last border holds a whole delimiter. So borders lie
between tokens: where a tokenizer writes ". The" as "." and " The", the step ends with " The".
"""

from collections.abc import Callable, Sequence

# Tokens of context that show how the newest one reads: no character takes more in a byte-level vocabulary.
TAIL = 8


class Delimiters:
    """texts: what ends a step, e.g. ("\\n",) or ("\\n", ". ", ".$ "). decode: token ids -> text."""

    def __init__(self, texts: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.texts = tuple(texts)
        self.decode = decode
        self._may_end: dict[int, bool] = {}

    def end(self, ids: Sequence[int]) -> bool:
        """Whether the last of these tokens completes a delimiter that was not complete before it."""
        if not self._candidate(ids[-1]):
            return False
        tail = list(ids[-TAIL:])
        text, before = self.decode(tail), self.decode(tail[:-1])
        return any(each in text[max(0, len(before) - len(each) + 1) :] for each in self.texts)

    def _candidate(self, token: int) -> bool:
        """Whether the token holds the last character of a delimiter at all; most do not, and cost one look-up."""
        found = self._may_end.get(token)
        if found is None:
            # Twice, because some tokenizers drop the space that a text starts with.
            text = self.decode([token, token])
            found = self._may_end[token] = any(each[-1] in text for each in self.texts)
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
