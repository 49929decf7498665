"""The Dockerfile, line by line as far as that goes without a daemon: what it copies, installs and starts exists."""

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from rlhfctl.cli.main import COMMANDS

KNOWN = {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


@pytest.fixture(scope="module")
def lines(repo: Path) -> list[tuple[str, str]]:
    """(instruction, the rest), continued lines joined."""
    text = re.sub(r"^#.*\n", "", (repo / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(instruction, " ".join(rest.split())) for instruction, rest in found]


def test_every_instruction_is_one(lines: list[tuple[str, str]]) -> None:
    assert {instruction for instruction, _ in lines} <= KNOWN
    assert lines[0][0] == "FROM"
    assert re.search(r" AS (\w+)$", lines[0][1])


def test_what_it_copies_is_there_and_not_ignored(repo: Path, lines: list[tuple[str, str]]) -> None:
    ignored = [line.strip() for line in (repo / ".dockerignore").read_text().splitlines() if line.strip()]
    copied = []
    for instruction, rest in lines:
        words = shlex.split(rest)
        if instruction == "COPY" and not words[0].startswith("--from="):
            copied += words[:-1]
    assert {"pyproject.toml", "rlhfctl", "recipes", "completions"} <= set(copied)
    for source in copied:
        assert (repo / source).exists(), source
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), source


def test_the_build_copies_all_that_the_wheel_is_made_of(repo: Path, lines: list[tuple[str, str]]) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "LICENSE"}
    assert needed <= {word for instruction, rest in lines if instruction == "COPY" for word in rest.split()}


def test_the_extras_it_installs_exist(repo: Path, lines: list[tuple[str, str]]) -> None:
    (extras,) = [rest.removeprefix("EXTRAS=") for instruction, rest in lines if instruction == "ARG"]
    known = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    assert ("RUN", 'pip install ".[$EXTRAS]"') in lines


def test_the_python_is_one_of_the_metadata(repo: Path, lines: list[tuple[str, str]]) -> None:
    classifiers = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["classifiers"]
    images = {rest.split()[0] for instruction, rest in lines if instruction == "FROM"}
    (image,) = images  # both stages on one: the virtual environment's interpreter must be where it was
    version = re.match(r"python:(\d\.\d+)-", image)
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in classifiers


def test_the_commands_of_its_header_are_ours(repo: Path, lines: list[tuple[str, str]]) -> None:
    assert ("ENTRYPOINT", '["rlhfctl"]') in lines
    header = (repo / "Dockerfile").read_text().split("FROM")[0]
    started = re.findall(r"docker run .* rlhfctl ([\w-]+)", header)
    assert started
    assert set(started) <= set(COMMANDS)
