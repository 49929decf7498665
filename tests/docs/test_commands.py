"""Command lines, recipes and reward functions of the pages: lines parse, recipes load, functions score."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rlhfctl.cli.main import app
from rlhfctl.errors import RlhfctlError
from rlhfctl.recipe.catalogue import shipped_names
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.tasks import TASKS

REPO = Path(__file__).resolve().parents[2]
PAGES = [*sorted((REPO / "docs").rglob("*.md")), *sorted(REPO.glob("README*.md")), REPO / "CONTRIBUTING.md"]
SHIPPED = {name: load_recipe(name).recipe.task for name in shipped_names()}
# Lines that show a form or a mistake, not a command.
FORMS = re.compile(r"\[--|\[KEY|\[-|MODEL_OR|\.\.\.|\| |RUN_DIR|POLICY|RECIPE |klcoef|<|\$\d|\"\$|\bDIR\b")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks: every second part between fences, its first line the language."""
    inside = re.split(r"^```", text, flags=re.MULTILINE)[1::2]
    return [block.split("\n", 1)[1] for block in inside if block.split("\n", 1)[0] == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `rlhfctl` of each line of a shell block; continued lines joined, comments dropped."""
    for block in [*blocks(page.read_text(), ""), *blocks(page.read_text(), "sh")]:
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\$ ", "", line.strip())
            if line.startswith("rlhfctl ") and not FORMS.search(line):
                words = shlex.split(re.split(r" [>|] ", line)[0], comments=True)
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_the_commands_of_the_page_parse_and_their_overrides_apply(page: Path) -> None:
    root = get_command(app)
    for words in commands(page):
        name, *rest = words
        command = root.commands[name]  # type: ignore[attr-defined]
        context = command.make_context(name, list(rest))
        if name in TASKS:
            given: dict[str, Any] = context.params
            source, overrides = given["recipe"], list(given["overrides"] or [])
            if source and "=" in source:
                source, overrides = None, [source, *overrides]
            # `my.yaml`: some shipped recipe of the task takes these overrides.
            sources = [source] if source in SHIPPED else [each for each in SHIPPED if SHIPPED[each] == name]
            problems = [problem for each in sources if (problem := refusal(each, overrides, name))]
            assert len(problems) < len(sources), problems[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_the_forms_of_the_page_name_options_that_exist(page: Path) -> None:
    root = get_command(app)
    for block in blocks(page.read_text(), ""):
        for line in block.replace("\\\n", " ").splitlines():
            name = re.match(r"(?:\$ )?rlhfctl (\w[\w-]*)", line)
            if name is None or not FORMS.search(line):
                continue
            command = root.commands[name[1]]  # type: ignore[attr-defined]
            known = {flag for param in command.params for flag in param.opts} | {"--help"}
            assert (
                set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", line.split("   ")[0])) - {"-n", "-q", "-v"}
                <= known
            )


def refusal(source: str, overrides: list[str], task: str) -> str | None:
    try:
        load_recipe(source, overrides, task)
    except RlhfctlError as error:
        return error.message
    return None


def test_the_pages_have_commands() -> None:
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 50
    assert {words[0] for words in found} >= {*TASKS, "eval", "report", "serve-rm", "inspect-template"}


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
