import gzip
import json
from pathlib import Path

import pytest

from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.load import load_samples
from rlhfctl.data.readers import read_rows
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import DataSource

ROWS = [
    {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}], "k": 1},
    {
        "messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "d", "name": "x"}],
        "k": 2,
    },
]


def write_form(directory: Path, form: str) -> Path:
    path = directory / f"rows{form}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if form == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif form == ".jsonl":
        path.write_bytes(lines)
    elif form == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("form", [".json", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_form_gives_the_same_samples(tmp_path: Path, form: str) -> None:
    """Ids too: a table that fills absent keys with None must not change the hash."""
    samples = load_samples([DataSource(path=str(write_form(tmp_path, form)))]).samples
    assert [sample.id for sample in samples] == ["1c1012e9c2b65914", "b961473942ad90c8"]
    assert samples[0].messages == ROWS[0]["messages"]
    assert samples[1].messages == ROWS[1]["messages"]
    assert [sample.metadata for sample in samples] == [{"k": 1}, {"k": 2}]


def test_row_numbers_are_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')
    rows = list(read_rows(str(path)))
    assert rows[0] == (1, {"a": 1})
    assert rows[-1] == (6, {"a": 2})
    assert [number for number, row in rows if isinstance(row, BadRow)] == [3, 4, 5]
    reasons = [str(row) for _, row in rows[1:4]]
    assert reasons[0] == "not JSON (Expecting value at column 7)"
    assert reasons[1] == "a list instead of an object"
    assert reasons[2] == "not UTF-8 at byte 7"


def test_deep_nesting_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 200_000 + "\n")
    ((number, row),) = read_rows(str(path))
    assert number == 1
    assert str(row).startswith("not JSON")


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert list(read_rows(str(path))) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b'{"rows": []}', "holds one dict, not a list of rows"),
        ("a.json", b"[1, ", "is not JSON"),
        ("a.jsonl.gz", b"plain text", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-20], "is not a whole gzip file"),
        ("a.parquet", b"not parquet at all", "is not a readable parquet file"),
        ("a.csv", b"a,b\n", "unknown form of data file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(Refused, match=sentence) as caught:
        list(read_rows(str(path)))
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("path", ["absent.jsonl", "some/where/absent.parquet", "a b c"])
def test_missing_file(path: str) -> None:
    with pytest.raises(Refused, match=f"{path}: no such data file"):
        list(read_rows(path))


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is a directory"):
        list(read_rows(str(tmp_path)))


def test_hub_id_that_does_not_load_is_one_sentence() -> None:
    """The test session is offline: the client's own error must come out as one sentence."""
    with pytest.raises(
        Refused, match="no-such-owner/no-such-set is no file here, and split 'train'"
    ) as caught:
        list(read_rows("no-such-owner/no-such-set"))
    assert "\n" not in caught.value.message


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"question": "1+1?", "answer": "2"}])
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("owner/set", "test", "main")) == [(1, {"question": "1+1?", "answer": "2"})]
    assert asked == [("owner/set", "main", "test")]


@pytest.mark.parametrize("keys", [{"split": "test"}, {"subset": "main"}])
def test_split_of_a_file_is_not_ignored(tmp_path: Path, keys: dict[str, str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(Refused, match="is a file: split and subset are for hub data sets"):
        list(read_rows(str(path), **keys))
