"""Finding the row of a prompt by its text, for services that know nothing but a query string.

Decoding an encoded prompt rarely gives the prompt back: special tokens stand at its ends, whitespace, case, composition
and accents change. Stages go from the weakest normalisation to the strongest; the first that finds exactly one row
wins. Where the tokenizer is at hand, `Matcher(..., recode=...)` needs none of this: rows are keyed by what it makes of
them. The fuzzy stage forgives only what decoding can lose, never another word, number or sign.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["exact", "normalised", "fuzzy"]

THRESHOLD = 80.0  # likeness of a damaged word, 0 to 100
SPECIAL = re.compile(
    r"<[|\uff5c][^<>]{1,40}[|\uff5c]>|</?(?:s|bos|eos|pad|unk)>|\[(?:CLS|SEP|PAD|BOS|EOS|UNK|MASK)\]"
)
EXACT = ("recoded", "drop_special_edges")  # special tokens at the ends are what every decoder adds
LOST = re.compile("[\ufffd\u2581\u200b\u00ad\ufeff\u200d]")  # what decoders drop or cannot write


def _unix(text: str) -> str:
    return text.strip().replace("\r\n", "\n").replace("\r", "\n")


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", _unix(text))


def _collapse(text: str) -> str:
    return " ".join(_nfc(text).split())


def _nfkc(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _casefold(text: str) -> str:
    return _nfkc(text).casefold()


def _drop_whitespace(text: str) -> str:
    return "".join(_casefold(text).split())


def _strip_marks(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", _drop_whitespace(text))
    return "".join(char for char in decomposed if not unicodedata.combining(char))


# Weakest first. Each takes in those before it.
STAGES: dict[str, Callable[[str], str]] = {
    "drop_special_edges": lambda text: text,
    "strip": str.strip,
    "newline": _unix,
    "nfc": _nfc,
    "collapse_ws": _collapse,
    "nfkc_collapse": _nfkc,
    "casefold": _casefold,
    "drop_ws_casefold": _drop_whitespace,
    "strip_marks": _strip_marks,
}
COMPATIBLE = ("nfkc_collapse", "casefold", "drop_ws_casefold", "strip_marks")
WHITESPACE = ("collapse_ws", *COMPATIBLE)


@dataclass(frozen=True, slots=True)
class Match:
    """index: of the row. stage: of STAGES, or "recoded", or "fuzzy"."""

    index: int
    stage: str


class Matcher:
    """Rows by prompt text. recode: prompt -> the text that a query with it arrives as (decode of encode, as the sender
    does it). special: the sender's special tokens, default: what looks like one. fuzzy: the last stage, on request."""

    def __init__(
        self,
        prompts: Sequence[str],
        recode: Callable[[str], str] | None = None,
        special: Iterable[str] = (),
        fuzzy: bool = False,
    ) -> None:
        self.prompts = list(prompts)
        self.fuzzy = fuzzy
        self.stages: Counter[str] = Counter()
        self.misses = 0
        edges = [re.escape(token) for token in sorted(set(special), key=len, reverse=True) if token]
        self._edge = "|".join(edges) or SPECIAL.pattern
        self._recoded = _by_key(map(recode, self.prompts)) if recode is not None else {}
        self._keys = {stage: _by_key(map(key, self.prompts)) for stage, key in STAGES.items()}

    def find(self, query: str) -> Match | None:
        """The one row whose prompt this is; None where there is none, or more than one."""
        match = self._find(query)
        if match is None:
            self.misses += 1
        else:
            self.stages[match.stage] += 1
        return match

    @property
    def rate(self) -> float:
        """Share of the queries so far that found a row; 1.0 before the first."""
        found = sum(self.stages.values())
        return found / (found + self.misses) if found + self.misses else 1.0

    def _find(self, query: str) -> Match | None:
        recoded = self._recoded.get(query, [])
        if len(recoded) == 1:
            return Match(recoded[0], "recoded")
        as_it_is = self._keys["drop_special_edges"].get(query, [])
        if len(as_it_is) == 1:  # a prompt that itself ends in a special token's string
            return Match(as_it_is[0], "drop_special_edges")
        text = self.without_edges(query)
        for stage, key in STAGES.items():
            alike = self._keys[stage].get(key(text), [])
            if not any(may(stage, text, self.prompts[row]) for row in alike):
                continue
            # Of several: stronger stages tell them apart even less.
            return Match(alike[0], stage) if len(alike) == 1 else None
        if not self.fuzzy:
            return None
        rows = [row for row, prompt in enumerate(self.prompts) if damaged(prompt, text)]
        return Match(rows[0], "fuzzy") if len(rows) == 1 else None

    def without_edges(self, query: str) -> str:
        """The query without the special tokens at its ends."""
        text = re.sub(rf"^(?:\s*(?:{self._edge}))+", "", query)
        return re.sub(rf"(?:(?:{self._edge})\s*)+$", "", text)


def answers_to(matcher: Matcher, text: Any, mode: Mode) -> int | None:
    """The row of a text under reward.match; None where it is no row's, or not one's alone."""
    found = matcher.find(text) if isinstance(text, str) else None
    if found is None or (mode == "exact" and found.stage not in EXACT):
        return None
    return found.index


def first_stage(prompt: str, query: str) -> str | None:
    """The weakest stage under which a query, special tokens at its ends removed, is the prompt; None: no stage."""
    text = Matcher([]).without_edges(query)
    return next(
        (stage for stage, key in STAGES.items() if key(text) == key(prompt) and may(stage, text, prompt)),
        None,
    )


def may(stage: str, query: str, prompt: str) -> bool:
    """Whether a lossy stage may be used: only where the query shows that its sender loses this everywhere.

    Numbers are the same before and after: without spaces 1 2 is 12, and NFKC makes 52 of five squared. Whitespace: one
    of the two has single spaces only; two texts that both keep lines differ in their indentation.
    Accents: the query is lower case throughout, as the tokenizers that strip accents make it.
    """
    if stage in COMPATIBLE and _numbers(query) != _numbers(prompt):
        return False
    if stage == "strip_marks" and (query != query.lower() or query != _bare(query)):
        return False
    if stage not in WHITESPACE or _nfc(query) == _nfc(prompt):
        return True
    return any(text.strip() == " ".join(text.split()) for text in (_nfc(query), _nfc(prompt)))


def _numbers(text: str) -> list[str]:
    """Digits that stand together; a power, an index or a fraction in one character stands for itself."""
    apart = "".join(f" {char} " if char.isnumeric() and not char.isdecimal() else char for char in text)
    return re.findall(r"\d+", unicodedata.normalize("NFKC", apart))


def _bare(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(char for char in decomposed if not unicodedata.combining(char))


def _by_key(keys: Iterable[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return rows


def damaged(prompt: str, query: str) -> bool:
    """Whether the query is the prompt as a lossy decoder leaves it: special-token strings gone, characters replaced
    by U+FFFD or dropped, words replaced by [UNK]. Every other word, number and sign has to be there, in order."""
    ours, theirs = _words(prompt), _words(query)
    if not theirs or len(ours) != len(theirs) or ours == theirs == []:
        return False
    intact = 0
    for word, other in zip(ours, theirs, strict=True):
        if word == other:
            intact += 1
        elif not _may_be_damage(word, other):
            return False
    # Where only whitespace differs, the stages have judged it.
    if intact == len(ours) and not SPECIAL.search(prompt):
        return False
    return 2 * intact >= len(ours)


def _words(text: str) -> list[str]:
    return SPECIAL.sub(" ", text).split()


def _may_be_damage(word: str, other: str) -> bool:
    lost = LOST.search(word) or LOST.search(other)
    if not lost or re.findall(r"\d+", word) != re.findall(r"\d+", other):
        return False
    from rapidfuzz import fuzz

    return fuzz.ratio(LOST.sub("", word), LOST.sub("", other)) >= THRESHOLD
