"""The tables are of the recorded results, and say what those hold."""

import json
from pathlib import Path

from benchmarks.learning.offline_table import markdown, rows_of


def test_the_page_holds_the_tables_of_the_recorded_results(repo: Path) -> None:
    found = json.loads((repo / "benchmarks/learning/oreo.json").read_text())
    page = (repo / "benchmarks/learning/oreo.md").read_text()
    for table in rows_of(found):
        assert markdown(table).strip() in page
    gain = found["0"]["oreo"]["accuracy"] - found["0"]["sft"]["accuracy"]
    assert f"{gain:+.3f}" in rows_of(found)[0][1][4]
