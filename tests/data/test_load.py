import json
from pathlib import Path

import pytest

from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import DataSource


@pytest.fixture
def qa_file(tmp_path: Path) -> Path:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(10)))
    return path


def source(path: Path, **keys: object) -> DataSource:
    return DataSource(path=str(path), **keys)


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(
        '{"question": "a", "answer": "1"}\n{"question": "b"}\n{oops\n{"question": "c", "answer": "2"}\n'
    )
    with pytest.raises(Refused) as caught:
        load_samples([source(path)], max_bad_rows=1)
    assert caught.value.exit_code == 5
    message = caught.value.message
    assert message.startswith(f"2 bad rows, 1 allowed (data.max_bad_rows): {path}: row 2: has no answer")
    assert "; row 3: not JSON" in message
    loaded = load_samples([source(path)], max_bad_rows=2)
    assert [sample.label for sample in loaded.samples] == ["1", "2"]
    assert [sample.origin for sample in loaded.samples] == [f"{path}:1", f"{path}:4"]
    assert [number for number, _ in loaded.reports[0].bad_rows] == [2, 3]
    assert (loaded.reports[0].rows, loaded.reports[0].used) == (4, 2)


def test_bad_rows_of_all_sources_together_count(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    assert len(load_samples([source(paths[0])], 1).samples) == 1
    with pytest.raises(Refused, match="2 bad rows, 1 allowed") as caught:
        load_samples([source(path) for path in paths], 1)
    assert all(f"{path}: row 2" in caught.value.message for path in paths)


def test_only_the_first_bad_rows_are_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n' + '{"question": "b"}\n' * 40)
    with pytest.raises(Refused, match=r"40 bad rows, 0 allowed.*row 6: has no answer.*; and 35 more$"):
        load_samples([source(path)])


def test_no_usable_row(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text("{\n[]\n")
    with pytest.raises(Refused, match="none of its 2 rows can be used; row 1: not JSON"):
        load_samples([source(path)], max_bad_rows=10)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.json", "")]
)
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=f"{name} is empty: it holds no rows"):
        load_samples([source(tmp_path / name)])


def test_limit_counts_rows_of_the_file(qa_file: Path) -> None:
    assert [sample.label for sample in load_samples([source(qa_file, limit=3)]).samples] == ["0", "1", "2"]


def test_columns_rename(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "q", "response": "old", "chosen": "good", "rejected": "bad"}\n')
    loaded = load_samples([source(path, format="prompt_response", columns={"chosen": "response"})])
    assert loaded.samples[0].response == "good"
    assert loaded.samples[0].metadata == {"rejected": "bad"}


def test_renaming_a_column_that_is_not_there(qa_file: Path) -> None:
    with pytest.raises(
        Refused, match=r"no column 'anwser', which data.*columns renames; did you mean answer"
    ):
        load_samples([source(qa_file, columns={"anwser": "label"})])


def test_repeated_ids_are_reported_and_made_unique(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(
        '{"id": "x", "question": "a", "answer": "1"}\n{"id": "x", "question": "b", "answer": "2"}\n'
    )
    second.write_text(
        '{"id": "x#2", "question": "c", "answer": "3"}\n{"id": "x", "question": "d", "answer": "4"}\n'
    )
    loaded = load_samples([source(first), source(second)])
    assert [sample.id for sample in loaded.samples] == ["x", "x#2", "x#2#2", "x#3"]
    assert [report.duplicate_ids for report in loaded.reports] == [["x"], ["x#2", "x"]]


def test_reports_point_into_the_samples(qa_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": "i", "input": "", "output": "o"}]))
    loaded = load_samples([source(qa_file), source(other, weight=2.5)])
    assert [(r.format, r.start, r.stop, r.weight) for r in loaded.reports] == [
        ("qa", 0, 10, 1.0),
        ("alpaca", 10, 11, 2.5),
    ]
    assert loaded.samples[10].response == "o"
