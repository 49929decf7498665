"""docs/cli.md and docs/recipes.md say what the code does."""

import re
import shlex
from pathlib import Path

import pytest

from rlhfctl.cli.exit_codes import STATUS
from rlhfctl.recipe.changes import MAY_CHANGE
from rlhfctl.recipe.errors import RecipeError
from rlhfctl.recipe.load import load_recipe


def test_the_exit_codes_of_the_page_are_those_of_the_code(repo: Path) -> None:
    page = (repo / "docs/cli.md").read_text()
    rows = re.findall(r"^\| ([\d, ]+) \| `(\w+)` \|", page, re.MULTILINE)
    assert {int(code): status for codes, status in rows for code in codes.split(",")} == STATUS


def test_the_page_lists_what_a_resume_may_change(repo: Path) -> None:
    page = (repo / "docs/cli.md").read_text()
    listed = page.split("may change\nand is announced:")[1].split("Any other difference")[0]
    assert set(re.findall(r"`([\w.*]+)`", listed)) == set(MAY_CHANGE)


def test_the_overrides_of_the_page_apply(repo: Path) -> None:
    page = (repo / "docs/recipes.md").read_text()
    block = page.split("## Overrides")[1].split("```")[1]
    overrides = [word for line in block.splitlines() for word in shlex.split(line, comments=True)]
    assert len(overrides) >= 6
    recipe = load_recipe("qwen/sft-0.5b", overrides).recipe
    assert [source.path for source in recipe.data.train] == ["other.jsonl", "more.jsonl"]
    assert (recipe.train.steps, recipe.train.epochs) == (None, 3)


def test_the_first_recipe_of_the_page_loads(repo: Path, tmp_path: Path) -> None:
    text = (repo / "docs/recipes.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "r.yaml")).recipe.train.epochs == 2


def test_the_errors_of_the_page_are_the_real_ones(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = (repo / "docs/recipes.md").read_text().split("## Errors")[1].split("```\n")[1]
    monkeypatch.chdir(tmp_path)
    head = "extends: quickstart/sft\noptim:\n  lr: 1e-6x\ntrain:\n  stpes: 100\n"
    Path("my.yaml").write_text(head)
    with pytest.raises(RecipeError) as error:
        load_recipe("my.yaml", ["data.shuffle=no"])
    assert f"{error.value.message}\n" == shown
