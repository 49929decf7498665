"""Help: plain, sectioned, at most 40 lines, with examples that run."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl import __version__
from rlhfctl.cli.main import SECTIONS
from rlhfctl.recipe.catalogue import shipped_names

Cli = Callable[..., Any]

COMMANDS = [name for names in SECTIONS.values() for name in names]
TRAINING = SECTIONS["Train"]


def test_the_overview_has_every_command_of_the_contract_in_its_section(cli: Cli) -> None:
    shown = cli("--help")
    assert shown.code == 0
    assert cli("-h").out == cli().out == shown.out
    assert sorted(COMMANDS) == sorted(
        [
            "sft",
            "rm",
            "ppo",
            "reft",
            "oreo",
            "serve-rm",
            "inspect-template",
            "eval",
            "recipes",
            "report",
            "doctor",
        ]
    )
    for title, names in SECTIONS.items():
        section = shown.out.split(f"\n{title}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines()] == list(names)
    for code in ("0 done", "1 the run failed", "2 ", "3 ", "4 ", "5 ", "130 / 143"):
        assert code in shown.out


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_plain_and_short(cli: Cli, command: list[str]) -> None:
    shown = cli(*command, "--help", FORCE_COLOR="1", GITHUB_ACTIONS="true")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.isascii()
    assert "\x1b" not in shown.out
    assert len(shown.out.splitlines()) <= 40
    assert max(len(line) for line in shown.out.splitlines()) <= 80
    assert not any(line.endswith("...") for line in shown.out.splitlines()[1:])


@pytest.mark.parametrize("command", [[], ["sft"], ["ppo"], ["recipes"]])
def test_examples_name_real_commands_recipes_and_keys(cli: Cli, command: list[str]) -> None:
    block = cli(*command, "--help").out.split("Examples:\n")[1].split("\n\n")[0]
    examples = [shlex.split(line.split(">")[0])[1:] for line in block.splitlines()]
    assert len(examples) >= 3
    for words in examples:
        assert words[0] in COMMANDS
        if words[0] in TRAINING and "my.yaml" in words:
            words = [f"quickstart/{words[0]}" if word == "my.yaml" else word for word in words]
            words += ["train.steps=null"] if any("train.epochs" in word for word in words) else []
        assert all(
            word in shipped_names()
            for word in words
            if "/" in word and "=" not in word and "runs" not in word
        )
        if words[0] in TRAINING and "--resume" not in words:
            run = [word for word in words if word not in ("--run-dir", "runs/a")]
            # The quickstart's data is not there: refused, and not for its usage.
            assert cli(*run, "--dry-run").code in (0, 5)


def test_a_reader_of_the_help_that_goes_away(tmp_path: Path) -> None:
    script = f"{sys.executable} -m rlhfctl --help 2>err | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "0\n"
    assert (tmp_path / "err").read_text() == ""


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"rlhfctl {__version__}\n"
