"""Options that the pages name exist, recipes of the tutorials load, their reward functions score."""

import re
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, REPO, blocks
from typer.main import get_command

from rlhfctl.cli.main import app
from rlhfctl.recipe.load import load_recipe

# A command in a block (and what goes on in the lines below it) or between backticks.
COMMAND = re.compile(r"(?:^(?:\$ )?|`)rlhfctl (\w[\w-]*)([^\n`]*(?:\n  +[\[-][^\n`]*)*)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_every_option_that_the_page_gives_a_command_exists(page: Path) -> None:
    root = get_command(app)
    for name, words in COMMAND.findall(page.read_text()):
        command = root.commands.get(name)  # type: ignore[attr-defined]
        if command is None:  # prose
            continue
        known = {flag for param in command.params for flag in param.opts} | {"--help"}
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", words.split("   #")[0])) <= known, (
            f"rlhfctl {name}{words}"
        )


def test_the_pages_have_commands() -> None:
    found = [name for page in PAGES for name, _ in COMMAND.findall(page.read_text())]
    assert len(found) > 100
    assert set(found) >= set(get_command(app).commands)  # type: ignore[attr-defined]


TUTORIALS = sorted((REPO / "docs/tutorials").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_recipes_and_functions_of_a_tutorial(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    recipes = blocks(text, "yaml")
    assert recipes
    for number, recipe in enumerate(recipes):
        path = tmp_path / f"{number}.yaml"
        path.write_text(recipe)
        load_recipe(str(path))
    for source in blocks(text, "python"):
        space: dict[str, Any] = {}
        exec(source, space)
        right, wrong = {"response": "1 + 1 = 2\n2", "label": "2"}, {"response": "none", "label": "2"}
        scores = [
            each if isinstance(each, float) else each["score"] for each in space["score"]([right, wrong])
        ]
        assert scores == [1.0, 0.0]


def test_there_is_a_tutorial_for_each_story() -> None:
    assert [page.stem for page in TUTORIALS] == [
        "cross-family", "oreo", "reward-model-8b", "token-rewards", "verifier",
    ]  # fmt: skip


def test_the_chinese_readme_has_the_commands_of_the_english_one() -> None:
    def said(name: str) -> list[str]:
        """Lines of shell blocks, lines behind a prompt, and the commands of the table."""
        text = (REPO / name).read_text()
        typed = [line for block in blocks(text, "sh") for line in block.splitlines()]
        typed += [line for block in blocks(text, "") for line in block.splitlines() if line.startswith("$ ")]
        return typed + re.findall(r"^\| (`[^`]+`) \|", text, re.MULTILINE)

    assert said("README.zh-CN.md") == said("README.md")
    linked = [set(re.findall(r"\]\(((?:docs|benchmarks)/[\w./-]+)\)", (REPO / name).read_text())) for name in (
        "README.zh-CN.md", "README.md",
    )]  # fmt: skip
    assert linked[0] == linked[1]
