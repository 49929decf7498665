"""One reader per on-disk form: a path becomes (row number, row) pairs.

Row numbers are 1-based and are what a user sees in an editor: the line of a .jsonl file, the element of a
.json list, the row of a table. A line that is no JSON object comes out as a BadRow in its place, so that it
is counted; a file that cannot be read at all raises Refused.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhfctl.data.bad_row import BadRow
from rlhfctl.errors import Refused, Unable, is_disk_full
from rlhfctl.install import install_line
from rlhfctl.templates.hub import chain, hub_failure

Row = dict[str, Any]
NumberedRow = tuple[int, Row | BadRow]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_rows(path: str, split: str = "train", subset: str | None = None) -> Iterator[NumberedRow]:
    """Rows of a file (.json .jsonl .jsonl.gz .parquet) or of a split of a hub data set (or of its subset).

    Raises Refused where the file is missing, a directory, unreadable or of an unknown form, and Unable where
    a package is missing.
    """
    file = Path(path)
    reader = next((reader for suffix, reader in READERS.items() if path.lower().endswith(suffix)), None)
    if file.is_dir():
        raise Refused(f"{path} is a directory: name one file ({' '.join(READERS)}) or a hub id")
    if reader is None and file.exists():
        raise Refused(f"{path}: unknown form of data file, it must end in one of {' '.join(READERS)}")
    if reader is None and HUB_ID.fullmatch(path):
        return _hub(path, split, subset)
    if reader is None or not file.exists():
        raise Refused(f"{path}: no such data file; check data.*.path")
    if split != "train" or subset is not None:
        raise Refused(f"{path} is a file: split and subset are for hub data sets, remove them")
    return _guarded(path, reader(file))


def _guarded(path: str, rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
    try:
        yield from rows
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused(f"{path} is not a whole gzip file ({error}); make it again") from None
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror or error}") from None


def _jsonl(file: Path) -> Iterator[NumberedRow]:
    with file.open("rb") as stream:
        yield from _lines(stream)


def _jsonl_gz(file: Path) -> Iterator[NumberedRow]:
    with gzip.open(file, "rb") as stream:
        yield from _lines(stream)


def _lines(stream: Iterable[bytes]) -> Iterator[NumberedRow]:
    # Bytes, split at \n alone: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> Row | BadRow:
    try:
        return _as_row(json.loads(line.decode("utf-8").rstrip("\r\n")))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON ({error})")


def _as_row(value: Any) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow(f"a {type(value).__name__} instead of an object")


def _json(file: Path) -> Iterator[NumberedRow]:
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        return
    try:
        rows = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        first, _, rest = content.partition(b"\n")
        if rest.strip() and isinstance(_parse_line(first), dict):  # JSON lines are often named .json
            yield from _lines(content.splitlines(keepends=True))
            return
        raise Refused(f"{file} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise Refused(f"{file} holds one {type(rows).__name__}, not a list of rows")
    for number, row in enumerate(rows, start=1):
        yield number, _as_row(row)


def _parquet(file: Path) -> Iterator[NumberedRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Unable(f"reading {file} needs pyarrow: {install_line('train')}") from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise Refused(f"{file} is not a readable parquet file: {error}") from None


def _hub(name: str, split: str, subset: str | None) -> Iterator[NumberedRow]:
    try:
        import datasets
    except ImportError:
        raise Unable(
            f"{name} is no file here, and to load it from the hub: {install_line('train')}"
        ) from None
    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises a dozen types: offline, absent, gated, unknown split
        reason, fix = hub_failure(error, name)
        kind = Unable if any(map(is_disk_full, chain(error))) else Refused
        raise kind(
            f"{name} is no file here, and split {split!r} of it does not load from the hub: {reason}; {fix}"
        ) from None
    for number, row in enumerate(table, start=1):
        yield number, dict(row)


READERS = {".jsonl.gz": _jsonl_gz, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
