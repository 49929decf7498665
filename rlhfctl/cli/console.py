"""The only printer of the command line: the result goes to stdout, all else to stderr.

With --json stdout gets exactly one object, whatever happens. A reader that went away (a broken pipe) ends nothing:
what it would have read is dropped, and the exit code stands.
"""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rlhfctl.cli.exit_codes import DONE, FAILED, status_of
from rlhfctl.streams import write

if TYPE_CHECKING:
    from rlhfctl.preflight.run import Report

SCHEMA = 1


class Console:
    """json: the result is one object. quiet: on stderr errors alone. verbose: tracebacks and progress in full.

    began: whether a command was entered, so that more than its help is expected. finished: its result was told.
    """

    def __init__(self, json: bool, quiet: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.began = False
        self.finished = False

    def note(self, line: str) -> None:
        """One line for the person who watches."""
        if not self.quiet:
            write(sys.stderr, f"{line}\n")

    def error(self, text: str) -> None:
        write(sys.stderr, f"{text}\n")

    def finish(
        self,
        exit_code: int,
        text: str = "",
        message: str | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> int:
        """The command's result, once: `text` on stdout, or the object of --json. Returns the exit code.

        message: one sentence for stderr, and the object's `message`. fields: what else the object holds.
        """
        if self.finished:
            return exit_code
        self.finished = True
        if message and exit_code != DONE:
            self.error(message)
        elif message:
            self.note(message)
        if self.json:
            import json

            result = {
                "schema": SCHEMA,
                "status": status_of(exit_code),
                "exit_code": exit_code,
                "message": message,
            }
            text = json.dumps({**result, **(fields or {})}, default=str)
        if text and not write(sys.stdout, text if text.endswith("\n") else f"{text}\n"):
            return exit_code or FAILED
        return exit_code

    def report(self, report: "Report") -> None:
        """Preflight findings as a plain table, the gravest first."""
        rows = [row for row in report.rows() if row[0] == "error" or not self.quiet]
        for line in table(rows, terminal_width(sys.stderr)):
            self.error(line)


def table(rows: list[tuple[str, str, str, str]], width: int | None) -> list[str]:
    """Rows of (severity, id, what is wrong, what to do) as aligned lines, the last column on its own line."""
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    lines: list[tuple[str, str]] = []
    for severity, identity, wrong, fix in rows:
        first = f"{severity:{widths[0]}}  {identity:{widths[1]}}  "
        texts = [*wrong.split("\n"), *([f"fix: {fix}"] if fix else [])]
        lines += zip([first, *[" " * len(first)] * (len(texts) - 1)], texts, strict=True)
    return hanging(lines, width)


def hanging(rows: list[tuple[str, str]], width: int | None) -> list[str]:
    """Each text behind its head. Where that is wider than a terminal it goes on below, where the text began.

    width: of `terminal_width`. Lines break between words; a path longer than a line stays whole.
    """
    lines = []
    for head, text in rows:
        room = (width or 0) - len(head)
        if room < 16 or len(text) <= room:
            lines.append(head + text)
            continue
        import textwrap

        first, *rest = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        lines += [head + first, *(" " * len(head) + line for line in rest)]
    return lines


def terminal_width(stream: TextIO | None) -> int | None:
    """Columns of a terminal; None for a file or a pipe, whose lines stay whole."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream is not None else None
    except (OSError, ValueError):
        return None
