"""Start-up budgets in CPU time, and what is not imported before a command needs it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pace import assert_within

pytestmark = pytest.mark.timed
Cli = Callable[..., Any]

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "datasets",
    "rich",
    "pydantic",
    "yaml",
    "jinja2",
    "tokenizers",
    "huggingface_hub",
}


@pytest.mark.parametrize("args", [["--help"], ["--version"], []])
def test_help_and_version(cli: Cli, args: list[str]) -> None:
    assert_within(0.100, lambda: cli(*args).cpu)


@pytest.mark.parametrize(
    "args", [["ppo", "--help"], ["recipes", "--help"], ["recipes"], ["recipes", "show", "quickstart/ppo"]]
)
def test_command_help_and_recipes(cli: Cli, args: list[str]) -> None:
    assert_within(0.200, lambda: cli(*args).cpu)


@pytest.mark.parametrize(
    ("line", "budget"),
    [
        ("rlhfctl p", 0.200),
        ("rlhfctl ppo q", 0.200),
        ("rlhfctl ppo quickstart/ppo algorithm.", 0.250),  # the schema is pydantic's
        ("rlhfctl ppo r --", 0.200),
    ],
)
def test_completion(cli: Cli, line: str, budget: float) -> None:
    env = {"_RLHFCTL_COMPLETE": "bash", "COMP_LINE": line}
    assert cli(**env).out
    assert_within(budget, lambda: cli(**env).cpu)


def test_dry_run_without_models(cli: Cli) -> None:
    ended = cli("ppo", "quickstart/ppo", "--dry-run")
    assert ended.out.startswith("task: ppo\n")
    assert_within(0.400, lambda: cli("ppo", "quickstart/ppo", "--dry-run").cpu)


def test_a_recipe_error(cli: Cli) -> None:
    assert_within(0.300, lambda: cli("ppo", "quickstart/ppo", "optim.lrr=1").cpu)


def modules_after(code: str, cwd: Path | None = None) -> set[str]:
    script = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=cwd)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_command_line_imports_nothing_heavy() -> None:
    assert modules_after("import rlhfctl.cli.main") & HEAVY == set()


def test_a_dry_run_imports_no_torch(tmp_path: Path) -> None:
    """In an empty directory: in a checkout the quickstart may have left its models and data."""
    code = """
import sys
from rlhfctl.cli.main import run
assert run(["ppo", "quickstart/ppo", "--dry-run", "-q"]) == 5
sys.stdout = sys.stderr
sys.stdout = sys.__stdout__
"""
    assert modules_after(code, tmp_path) & {"torch", "transformers", "datasets", "rich"} == set()
