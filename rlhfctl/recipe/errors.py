"""Everything that is wrong with a recipe, in one report: where it stands, the line, a caret, what to do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhfctl.errors import UsageError

SHOWN_COLUMNS = 100  # of a longer line only the part around the caret is shown


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a file (line and column count from 1), or the override that gave a value."""

    file: str
    line: int = 0
    column: int = 0
    text: str = ""
    override: str | None = None

    def __str__(self) -> str:
        return f"override {self.override}" if self.override else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """key: dotted, '' where it is about the whole file. suggestion: what was probably meant."""

    message: str
    place: Place | None = None
    key: str = ""
    suggestion: str | None = None

    def lines(self) -> list[str]:
        said = f"{self.message}; did you mean {self.suggestion}?" if self.suggestion else self.message
        if self.place is None:
            return [said]
        first = f"{self.place}: {said}"
        if self.place.override or not self.place.text.strip():
            return [first]
        text, column = window(self.place.text.rstrip().replace("\t", " "), self.place.column)
        number = str(self.place.line)
        return [first, f"  {number} | {text}", f"  {' ' * len(number)} | {' ' * (column - 1)}^"]

    def as_dict(self) -> dict[str, Any]:
        place = self.place
        in_file = place is not None and not place.override
        return {
            "file": place.file if place and in_file else None,
            "line": place.line if place and in_file else None,
            "column": place.column if place and in_file else None,
            "override": place.override if place else None,
            "key": self.key,
            "message": self.message,
            "suggestion": self.suggestion,
        }


class RecipeError(UsageError):
    """All problems of one recipe; `message` is the whole report."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = sorted(problems, key=order)
        super().__init__("\n".join(line for problem in self.problems for line in problem.lines()))


def order(problem: Problem) -> tuple[bool, str, int, int]:
    """As they stand in the file, overrides last."""
    place = problem.place
    if place is None:
        return False, "", 0, 0
    return place.override is not None, place.file, place.line, place.column


def window(text: str, column: int) -> tuple[str, int]:
    """The part of a long line around `column` (from 1), and the column in that part."""
    if len(text) <= SHOWN_COLUMNS:
        return text, column
    start = min(max(0, column - SHOWN_COLUMNS // 2), len(text) - SHOWN_COLUMNS)
    if start <= 0:
        return f"{text[:SHOWN_COLUMNS]}...", column
    return f"...{text[start : start + SHOWN_COLUMNS]}", column - start + 3
