"""docs/launch.md and docs/preflight.md against the code: every key with its default, every finding with its row."""

import re
from pathlib import Path

from rlhfctl.recipe.sections import Launch


def test_every_launch_key_has_a_row_with_its_default(repo: Path) -> None:
    page = (repo / "docs" / "launch.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE))
    fields = Launch.model_fields
    assert set(rows) == set(fields)
    shown = {key: "null" if field.default is None else str(field.default) for key, field in fields.items()}
    assert rows == shown


def test_every_finding_has_a_row_and_every_row_a_finding(repo: Path) -> None:
    page = (repo / "docs" / "preflight.md").read_text()
    documented = re.findall(r"^\| ([WDMRSXCT]\d{3}) \|", page, re.MULTILINE)
    assert len(documented) == len(set(documented))
    files = [path for path in (repo / "rlhfctl" / "preflight").glob("*.py") if path.name != "template.py"]
    made = {name for path in files for name in re.findall(r'"([WDMRSXC]\d{3})"', path.read_text())}
    assert {"W001", "D001", "M001", "R001", "S001", "X001", "C001"} <= made
    assert set(documented) == made | {"T000"}


def test_severities_and_exit_codes_are_those_of_the_code(repo: Path) -> None:
    """A row that says error has an exit code, one that does not has none."""
    page = (repo / "docs" / "preflight.md").read_text()
    rows = re.findall(r"^\| [WDMRSXC]\d{3} \| ([\w, ]+) \| .* \|([^|]*)\|$", page, re.MULTILINE)
    assert len(rows) > 40
    for severity, code in rows:
        assert bool(code.strip()) == ("error" in severity)
