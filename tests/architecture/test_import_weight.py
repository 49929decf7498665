"""What importing a light module pulls in, asked of a fresh interpreter."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "pandas",
    "pyarrow",
    "datasets",
    "peft",
    "sympy",
    "accelerate",
    "scipy",
}
# What a command needs only once it runs: help, completion and a typing error must not pay for it.
DEFERRED = {"pydantic", "jinja2", "yaml", "tokenizers", "safetensors", "huggingface_hub", "rich"}

LIGHT = [
    "rlhfctl.launch.run",
    "rlhfctl.preflight.run",
    "rlhfctl.recipe.load",
    "rlhfctl.templates.encode",
    "rlhfctl.rewards.build",
    "rlhfctl.rewards.shaping",
    "rlhfctl.data.load",
    "rlhfctl.data.encode",
    "rlhfctl.run_dir",
    "rlhfctl.worker",
]


def imported_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str) -> None:
    assert imported_by(module) & HEAVY == set()


def test_the_command_line_defers_everything() -> None:
    assert imported_by("rlhfctl.cli.main") & (HEAVY | DEFERRED) == set()


@pytest.mark.parametrize("module", ["rlhfctl.run_dir", "rlhfctl.stop", "rlhfctl.failure", "rlhfctl.errors"])
def test_both_sides_of_the_boundary_share_the_standard_library_alone(module: str) -> None:
    allowed = set(sys.stdlib_module_names) | {"rlhfctl", "_distutils_hack", "sitecustomize", "usercustomize"}
    loaded = {name for name in imported_by(module) if not name.startswith(("_", "__editable__"))}
    assert loaded - allowed == set()


def test_heavy_modules_do_exist_here() -> None:
    """The tests above would pass on a machine without torch; this suite is not run on one."""
    assert importlib.util.find_spec("torch") is not None


def test_the_package_is_the_checkout(repo: Path) -> None:
    import rlhfctl

    assert Path(rlhfctl.__file__).parent == repo / "rlhfctl"
