"""docs/templates.md: a section for every finding, none for what does not exist, and the links of the report hold."""

import re
from pathlib import Path

from rlhfctl.templates.catalogue import DOCS, ENTRIES, Found, finding


def test_every_finding_has_its_section(repo: Path) -> None:
    page = (repo / DOCS).read_text()
    sections = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert sorted(sections) == sorted(ENTRIES)
    for section in re.split(r"^### \w+$", page, flags=re.MULTILINE)[1:]:
        assert len(section.split()) > 10
        assert section.strip().startswith("**")


def test_fixes_link_to_the_page(repo: Path) -> None:
    for id in ENTRIES:
        link = re.search(r"\((docs/templates\.md)#(\w+)\)$", finding(id, "policy", Found("", {})).fix)
        assert link is not None
        assert link[2].upper() == id
