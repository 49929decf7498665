"""Rows as they are trained on, kept on disk: the next start and a resumed one read them, 48,000 in about a second.

A file is named by the hash of all that its rows follow from: the bytes of the data, the keys of the recipe that read
them, chat template, tokenizer, and the code and libraries that made them. So it is never looked at whether a file is
still the right one; what nothing asks for any more goes as room is needed.

$RLHFCTL_CACHE, else rlhfctl/ in $XDG_CACHE_HOME or ~/.cache; RLHFCTL_CACHE= (empty) keeps nothing.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tokenizers import Tokenizer

from rlhfctl.collector import resting
from rlhfctl.data.encode import DropReport, SftRow, encode_sft
from rlhfctl.data.encode_judged import JudgedRow, Reading, encode_judged, pipeline, wanted_of
from rlhfctl.data.encode_offline import OfflineRow, encode_offline
from rlhfctl.data.load import Loaded, SourceReport, load_samples, stamps
from rlhfctl.data.samples import Sample
from rlhfctl.recipe.sections import DataSource
from rlhfctl.templates.encode import ChatEncoder

if TYPE_CHECKING:
    from rlhfctl.recipe.tasks import OreoRecipe, RmRecipe, SftRecipe

LEAST = 2_000  # samples; fewer are made in the time that it takes to find out whether they are kept
SHORTEST = 20  # bytes of a row in a file, at least
MOST = 1 << 30  # bytes of all files together
CHUNK = 1_000  # rows that are written at once
DIGEST = hashlib.sha256().digest_size
LIBRARIES = ("tokenizers", "jinja2", "datasets", "pyarrow")
# The post-processor that transformers adds where there is none; it adds nothing to a text.
NO_ADDITION = (
    '{"type":"TemplateProcessing","single":[{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A",'
    '"type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{}}'
)
R = TypeVar("R", SftRow, JudgedRow, OfflineRow)


@dataclass(slots=True)
class Rows(Generic[R]):
    """rows, report: what `encode` made of all samples. ids: the samples', in the order of the sources' files."""

    rows: list[R]
    report: DropReport
    ids: list[str]
    sources: list[SourceReport]

    def places(self) -> list[int | None]:
        """For each sample the index of its row; None: it was left out."""
        place = {row.id: index for index, row in enumerate(self.rows)}
        return [place.get(id) for id in self.ids]


@dataclass(slots=True)
class Preparation(Generic[R]):
    """How samples of `sources` become rows. how: the values that `encode` reads besides the encoder."""

    sources: list[DataSource]
    max_bad_rows: int
    judged: bool
    encoder: ChatEncoder
    how: dict[str, Any]
    encode: Callable[[list[Sample]], tuple[list[R], DropReport]]

    def make(self) -> Rows[R]:
        """The rows from disk, or made and kept. Raises what load_samples and `encode` raise."""
        held = self.held()
        if held is not None:
            return held
        loaded = load_samples(self.sources, self.max_bad_rows, self.judged)
        return self.keep(loaded, *self.encode(loaded.samples))

    def held(self) -> Rows[R] | None:
        """The rows from disk; None where they are not there."""
        file = self.file()
        return read(file) if file is not None else None

    def keep(self, loaded: Loaded, rows: list[R], report: DropReport) -> Rows[R]:
        """All rows of all samples, written to disk where that can be done."""
        made = Rows(rows, report, [sample.id for sample in loaded.samples], loaded.reports)
        file = self.file() if len(made.ids) >= LEAST else None
        # A file that changed since it was read is not what its hash of now stands for.
        if file is not None and stamps(self.sources) == loaded.stamps:
            with contextlib.suppress(OSError):  # a full disk or a home that is read only takes time, no more
                write(file, made)
        return made

    def file(self) -> Path | None:
        """Where the rows are kept. None: nowhere, or they follow from more than is known here: from data that is no
        file, or from the date."""
        directory = cache_directory()
        if directory is None or "strftime_now" in self.encoder.template:
            return None
        found = stamps(self.sources)
        if sum(size for _, size in filter(None, found)) < LEAST * SHORTEST:
            return None
        encoder, hashes = self.encoder, []
        for source, stamp in zip(self.sources, found, strict=True):
            if stamp is None:
                return None
            with open(source.path, "rb") as data:
                hashes.append(hashlib.file_digest(data, "sha256").hexdigest())
        parts = [
            [source.model_dump(mode="json") for source in self.sources],
            hashes,
            [self.max_bad_rows, self.judged, self.how],
            [
                encoder.template,
                encoder.tokens,
                encoder.template_kwargs,
                list(encoder.stop_ids),
                encoder.pad_id,
            ],
            fingerprint(encoder.tokenizer),
            code(),
        ]
        text = json.dumps(parts, sort_keys=True, default=str)
        return directory / f"{hashlib.sha256(text.encode()).hexdigest()}.rows"


def sft_preparation(
    sources: list[DataSource], max_bad_rows: int, encoder: ChatEncoder, max_length: int, train_on: str
) -> Preparation[SftRow]:
    return Preparation(
        sources,
        max_bad_rows,
        False,
        encoder,
        {"sft": [max_length, train_on]},
        lambda samples: encode_sft(samples, encoder, max_length, train_on),
    )


def rm_preparation(
    recipe: "RmRecipe", sources: list[DataSource], encoder: ChatEncoder
) -> Preparation[JudgedRow]:
    wanted, length = wanted_of(recipe.algorithm), recipe.data.max_length
    return Preparation(
        sources,
        recipe.data.max_bad_rows,
        True,
        encoder,
        {"rm": [length, asdict(wanted), recipe.template.model_dump(mode="json")]},
        lambda samples: encode_judged(samples, pipeline(recipe.template, encoder), length, wanted),
    )


def oreo_preparation(
    recipe: "OreoRecipe", sources: list[DataSource], encoder: ChatEncoder
) -> Preparation[OfflineRow]:
    data, algorithm = recipe.data, recipe.algorithm
    return Preparation(
        sources,
        data.max_bad_rows,
        True,
        encoder,
        {"oreo": [data.max_length, data.train_on, algorithm.model_dump(mode="json")]},
        lambda samples: encode_offline(samples, encoder, data.max_length, data.train_on, algorithm),
    )


def preparation(
    recipe: "SftRecipe | RmRecipe | OreoRecipe", sources: list[DataSource], encoder: ChatEncoder
) -> Preparation[Any]:
    """What the trainer of this recipe makes of `sources`."""
    if recipe.task == "rm":
        return rm_preparation(recipe, sources, encoder)
    if recipe.task == "oreo":
        return oreo_preparation(recipe, sources, encoder)
    data = recipe.data
    return sft_preparation(sources, data.max_bad_rows, encoder, data.max_length, data.train_on)


def cache_directory() -> Path | None:
    """The directory of the rows, made where it was not there; None where nothing is kept, or where another user could
    put files into it."""
    given = os.environ.get("RLHFCTL_CACHE", f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/rlhfctl")
    if not given:
        return None
    try:
        directory = Path(given).expanduser() / "rows"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except (OSError, RuntimeError):  # the latter: a user without HOME and without an entry in /etc/passwd
        return None
    return directory if found.st_uid == os.getuid() and not found.st_mode & 0o022 else None


@lru_cache(maxsize=2)
def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of all of it, equal for the checks before a run and for the run, which reads it through transformers."""
    text = tokenizer.to_str().replace(f'"post_processor":{NO_ADDITION}', '"post_processor":null')
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def code() -> list[str]:
    """The sources that make rows, of recipes what their keys mean, and the versions of the libraries they call."""
    digest, package = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for folder in ("data", "recipe", "templates"):
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return [digest.hexdigest(), *versions()]


def versions() -> Iterator[str]:
    for name in LIBRARIES:
        try:
            yield importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield ""


# A file: the hash of all that follows; a line of JSON with all but the rows; lines with CHUNK rows each.


@resting()
def read(file: Path) -> "Rows[Any] | None":
    """None where it is not there or is not whole: then it is made again."""
    try:
        with open(file, "rb") as held:
            if held.read(DIGEST) != hashlib.file_digest(held, "sha256").digest():
                return None
            held.seek(DIGEST)
            kind, (kept, dropped, examples), ids, sources = json.loads(held.readline())
            row = READ[kind]
            rows = [row(*fields) for line in held for fields in json.loads(line)]
        found = Rows(
            rows,
            DropReport(kept, Counter(dropped), examples),
            ids,
            [source_report(*each) for each in sources],
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # what is read stays longest
    return found


def judged_row(id: str, chosen: list[Any], rejected: list[Any] | None, *rest: Any) -> JudgedRow:
    return JudgedRow(id, Reading(*chosen), None if rejected is None else Reading(*rejected), *rest)


def source_report(
    path: str, format: str, rows: int, start: int, stop: int, weight: float, bad: Any, same: Any
) -> SourceReport:
    return SourceReport(path, format, rows, start, stop, weight, [(row, reason) for row, reason in bad], same)


READ: dict[str, Callable[..., Any]] = {"SftRow": SftRow, "JudgedRow": judged_row, "OfflineRow": OfflineRow}


def write(file: Path, made: "Rows[Any]") -> None:
    """Aside and renamed, so that two that write do no harm."""
    make_room(file.parent)
    aside = tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", suffix=".aside", delete=False)  # noqa: SIM115
    try:
        with aside as held:
            held.write(bytes(DIGEST))
            kind = type(made.rows[0]).__name__ if made.rows else "SftRow"
            held.write(line([kind, made.report, made.ids, made.sources]))
            for start in range(0, len(made.rows), CHUNK):
                held.write(line(made.rows[start : start + CHUNK]))
            held.seek(DIGEST)
            digest = hashlib.file_digest(held, "sha256").digest()
            held.seek(0)
            held.write(digest)
        os.replace(aside.name, file)
    except BaseException:
        Path(aside.name).unlink(missing_ok=True)
        raise


def line(value: Any) -> bytes:
    """JSON in which a dataclass is the list of its fields."""

    def fields(record: Any) -> list[Any]:
        return [getattr(record, name) for name in record.__dataclass_fields__]

    return json.dumps(value, default=fields, separators=(",", ":")).encode() + b"\n"


def make_room(directory: Path) -> None:
    """Those longest unused go until what is left takes half of the room."""
    files = [(entry.stat(), entry) for entry in directory.iterdir()]
    size = sum(found.st_size for found, _ in files)
    if size <= MOST:
        return
    for found, entry in sorted(files, key=lambda pair: pair[0].st_mtime):
        entry.unlink(missing_ok=True)
        size -= found.st_size
        if size <= MOST // 2:
            break
