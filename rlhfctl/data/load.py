"""Data sources of a recipe -> samples and one report per source."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlhfctl.collector import resting
from rlhfctl.data.adapters import ADAPTERS, adapt
from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.detect import detect_format, detect_judged
from rlhfctl.data.judged import JUDGED, SEVERAL, adapt_judged
from rlhfctl.data.readers import NumberedRow, read_rows
from rlhfctl.data.samples import Sample
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import DataSource

SHOWN = 5  # bad rows that a refusal names


@dataclass(slots=True)
class SourceReport:
    """What became of one source: samples[start:stop] of the loaded list are its rows.

    bad_rows: (row number, reason). duplicate_ids: ids of rows that another row, of this source or of an earlier
    one, has already used.
    """

    path: str
    format: str
    rows: int
    start: int
    stop: int
    weight: float = 1.0
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    duplicate_ids: list[str] = field(default_factory=list)

    @property
    def used(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class Loaded:
    """stamps: of the files as they were when they were read."""

    samples: list[Sample]
    reports: list[SourceReport]
    stamps: list[tuple[int, int] | None] = field(default_factory=list)


def stamps(sources: list[DataSource]) -> list[tuple[int, int] | None]:
    """(time of the last change in ns, size) of each source's file, which other bytes would change; None: no file."""
    files = (Path(source.path) for source in sources)
    found = (file.stat() if file.is_file() else None for file in files)
    return [None if each is None else (each.st_mtime_ns, each.st_size) for each in found]


@resting()
def load_samples(sources: list[DataSource], max_bad_rows: int = 0, judged: bool = False) -> Loaded:
    """All rows of all sources, in file order, ids unique (a repeated id gets `#2`, `#3`, ...).

    judged: rows are read with their judgement (preference, steps, reward), as rm trains on them.
    Raises Refused where a file is missing, empty or of no known format, where more than `max_bad_rows` rows
    of all sources together cannot be used, or where none can.
    """
    samples: list[Sample] = []
    reports: list[SourceReport] = []
    seen: dict[str, int] = {}
    before = stamps(sources)
    for source in sources:
        report = _load_source(source, samples, seen, judged)
        reports.append(report)
        if sum(len(report.bad_rows) for report in reports) > max_bad_rows:
            raise Refused(_too_many_bad_rows(reports, max_bad_rows))
        if not report.used:
            reasons = _first_reasons(report)
            raise Refused(f"{source.path}: none of its {report.rows} rows can be used; {reasons}")
    return Loaded(samples, reports, before)


def _load_source(
    source: DataSource, samples: list[Sample], seen: dict[str, int], judged: bool
) -> SourceReport:
    numbered = list(islice(read_rows(source.path, source.split, source.subset), source.limit))
    if not numbered:
        raise Refused(f"{source.path} is empty: it holds no rows")
    _check_columns(source, numbered)
    rows = [(number, _renamed(row, source.columns)) for number, row in numbered]
    format: str = source.format
    if format == "auto":
        first = next((row for _, row in rows if isinstance(row, dict)), None)
        detect = detect_judged if judged else detect_format
        format = "unknown" if first is None else detect(first, source.path)
    elif format not in (JUDGED if judged else ADAPTERS):
        raise Refused(_wrong_kind(source, judged))
    if format in SEVERAL:
        rows = _apart(rows, SEVERAL[format])
    report = SourceReport(source.path, format, len(rows), len(samples), len(samples), source.weight)
    for number, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            if judged:
                sample = adapt_judged(row, format, source.system, source.step_separator)
            else:
                sample = adapt(row, format, source.system)
        except BadRow as reason:
            report.bad_rows.append((number, str(reason)))
            continue
        sample.origin = f"{source.path}:{number}"
        _make_unique(sample, seen, report)
        samples.append(sample)
    report.stop = len(samples)
    return report


def _apart(
    rows: list[NumberedRow], several: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> list[NumberedRow]:
    """The rows that each row holds, under its number."""
    found: list[NumberedRow] = []
    for number, row in rows:
        try:
            parts: list[dict[str, Any]] = [] if isinstance(row, BadRow) else several(row)
        except BadRow as reason:
            row = reason
        found += [(number, row)] if isinstance(row, BadRow) else [(number, part) for part in parts]
    return found


def _wrong_kind(source: DataSource, judged: bool) -> str:
    if judged:
        return (
            f"{source.path}: rows of format {source.format} carry no judgement, which rm learns from; its formats are "
            f"{', '.join(JUDGED)}"
        )
    return (
        f"{source.path}: rows of format {source.format} are answers with a judgement, good and bad ones alike, for rm; "
        "to train on one side of them set format: prompt_response and columns: {chosen: response}"
    )


def _renamed(row: dict[str, Any] | BadRow, columns: dict[str, str]) -> dict[str, Any] | BadRow:
    if isinstance(row, BadRow) or not columns:
        return row
    # A renamed column wins over one that has its new name already, in whatever order they stand.
    moved = {columns[key]: value for key, value in row.items() if key in columns}
    return {key: value for key, value in row.items() if key not in columns and key not in moved} | moved


def _check_columns(source: DataSource, numbered: list[NumberedRow]) -> None:
    present = {key for _, row in numbered if isinstance(row, dict) for key in row}
    for theirs in source.columns:
        if theirs not in present:
            near = difflib.get_close_matches(theirs, present, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(present))}"
            raise Refused(f"{source.path} has no column {theirs!r}, which data.*.columns renames{hint}")


def _make_unique(sample: Sample, seen: dict[str, int], report: SourceReport) -> None:
    given = sample.id
    count = seen[given] = seen.get(given, 0) + 1
    if count > 1:
        report.duplicate_ids.append(given)
        while sample.id in seen:
            sample.id = f"{given}#{count}"
            count += 1
        seen[sample.id] = 1


def _first_reasons(report: SourceReport) -> str:
    shown = "; ".join(f"row {number}: {reason}" for number, reason in report.bad_rows[:SHOWN])
    more = len(report.bad_rows) - SHOWN
    return shown + (f"; and {more} more" if more > 0 else "")


def _too_many_bad_rows(reports: list[SourceReport], allowed: int) -> str:
    bad = [report for report in reports if report.bad_rows]
    total = sum(len(report.bad_rows) for report in bad)
    listed = " | ".join(f"{report.path}: {_first_reasons(report)}" for report in bad)
    return f"{total} bad rows, {allowed} allowed (data.max_bad_rows): {listed}"
