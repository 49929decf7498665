"""What a reward source returns for one sample. A failure is an outcome, never a score."""

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "error", "timeout", "missing"]


@dataclass(slots=True)
class Span:
    """Characters [start, end) of the response and their score."""

    start: int
    end: int
    score: float


@dataclass(slots=True)
class Outcome:
    """score is a finite float exactly when status is "ok"; error says why it is not.

    text_sha256: of the text that a reward model read, as its template rendered it; None where there is none.
    """

    status: Status
    score: float | None = None
    spans: list[Span] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    text_sha256: str | None = None
