"""The house that STYLE describes, held by reading the source: who imports whom, how large files are, what is left."""

import ast
import re
from pathlib import Path

import pytest

# package or module -> what it may import from rlhfctl at module level.
# Light side, before the process boundary: no torch, no transformers, no numpy at import.
LIGHT = {
    "errors": set(),
    "architectures": set(),
    "base_weights": set(),
    "checkpoint_files": set(),
    "collector": set(),
    "install": set(),
    "processor": set(),
    "run_dir": set(),
    "stop": set(),
    "streams": set(),
    "failure": {"run_dir"},
    "heartbeat": set(),
    "recipe": set(),
    "templates": set(),
    "data": {"recipe", "templates"},
    "preflight": {"recipe", "templates", "data", "rewards"},
    "launch": {"recipe", "templates", "preflight", "run_dir", "failure", "stop"},
    "cli": {"launch", "recipe", "templates", "preflight", "run_dir", "report"},
    "report": {"recipe", "run_dir"},
    "__main__": {"cli"},
    "quickstart": set(),
    "rewards": {"recipe", "templates", "data"},
}
HEAVY = {
    "worker": {"recipe", "run_dir", "failure", "heartbeat", "stop", "trainers", "tracking"},
    "trainers": {
        "rollout",
        "rewards",
        "data",
        "models",
        "search",
        "evaluation",
        "tracking",
        "algorithms",
        "recipe",
        "templates",
        "run_dir",
        "heartbeat",
    },
    "rollout": {"heartbeat", "models", "recipe", "templates", "data"},
    "search": {"rollout", "models", "recipe", "templates"},
    "evaluation": {"search", "rollout", "rewards", "models", "data", "recipe", "templates", "run_dir"},
    "models": {"recipe", "templates"},
    "serving": {"recipe", "templates", "data", "models", "rewards"},
    "tracking": {"recipe", "run_dir"},
    "algorithms": set(),
}
ALLOWED = LIGHT | HEAVY
# Imports inside functions that cross a line on purpose: (importing module, imported module).
LAZY = {
    ("launch.inline", "worker"),  # the process boundary, crossed in this very process
    ("rewards.build", "rewards.model"),  # torch, for `kind: model` alone
    ("cli.serve_rm", "serving"),  # the second heavy entry
    ("cli.evaluate", "evaluation"),  # the third
    ("worker", "models.heap"),  # before torch is imported
    ("worker", "models.pack_attention"),  # one choice for every model of the process
}
# Files that stand on the other side of their package: (module, package it may import at module level).
EXCEPTIONS = {("rewards.model", "models"), ("rewards.model", "algorithms")}
# Leaves that any layer may speak in.
WORDS = {
    "errors",
    "__version__",
    "architectures",
    "base_weights",
    "checkpoint_files",
    "collector",
    "install",
    "processor",
    "streams",
    "preflight.finding",
    "serving.protocol",
    "rollout.handshake",
}
THIRD_PARTY = {
    "torch",
    "transformers",
    "numpy",
    "peft",
    "datasets",
    "pyarrow",
    "math_verify",
    "rapidfuzz",
    "accelerate",
    "bitsandbytes",
}
# Light modules that are heavy inside on purpose; nothing light imports them at module level.
HEAVY_FILES = {"rewards/model.py"}
MAX_LINES = 500


def sources(repo: Path) -> list[Path]:
    return sorted((repo / "rlhfctl").rglob("*.py"))


def module_name(repo: Path, path: Path) -> str:
    """launch.run for rlhfctl/launch/run.py, cli for rlhfctl/cli/__init__.py."""
    parts = path.relative_to(repo / "rlhfctl").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(module, whether at import time, line) of every absolute import; TYPE_CHECKING blocks are left out."""
    found: list[tuple[str, bool, int]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                module = child.module or ""
                for alias in child.names:
                    submodule = f"{module}.{alias.name}"
                    found.append((submodule if module == "rlhfctl" else module, top, child.lineno))
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), True)
    return found


def test_imports_point_one_way(repo: Path) -> None:
    wrong = []
    for path in sources(repo):
        module = module_name(repo, path)
        layer = module.split(".")[0]
        if not layer:
            continue
        assert layer in ALLOWED, f"{path}: a new package needs its place in the table of layers"
        for imported, top, line in imports(path):
            if not imported.startswith("rlhfctl."):
                continue
            target = imported.removeprefix("rlhfctl.")
            package = target.split(".")[0]
            if package in ({layer} | ALLOWED[layer]) or target in WORDS or (module, package) in EXCEPTIONS:
                continue
            lazy = any(module == source and target.startswith(allowed) for source, allowed in LAZY)
            if top or not lazy:
                wrong.append(f"{path.relative_to(repo)}:{line}: {layer} may not import {package}")
    assert not wrong, "\n".join(wrong)


def test_the_light_side_imports_no_tensor_library(repo: Path) -> None:
    wrong = []
    for path in sources(repo):
        layer = module_name(repo, path).split(".")[0]
        if layer not in LIGHT or str(path.relative_to(repo / "rlhfctl")) in HEAVY_FILES:
            continue
        for imported, top, line in imports(path):
            if top and imported.split(".")[0] in THIRD_PARTY:
                wrong.append(f"{path.relative_to(repo)}:{line}: {imported} at import")
    assert not wrong, "\n".join(wrong)


def test_algorithms_are_pure(repo: Path) -> None:
    for path in (repo / "rlhfctl" / "algorithms").glob("*.py"):
        outside = {name.split(".")[0] for name, _, _ in imports(path)} - {
            "torch",
            "math",
            "typing",
            "collections",
            "dataclasses",
        }
        assert outside <= {"rlhfctl"}, f"{path.name} imports {outside}"
        ours = {name for name, _, _ in imports(path) if name.startswith("rlhfctl")}
        assert all(name.startswith("rlhfctl.algorithms") for name in ours), f"{path.name} imports {ours}"


def test_files_stay_small(repo: Path) -> None:
    sizes = {
        path: len(path.read_text().splitlines()) for path in [*sources(repo), *(repo / "tests").rglob("*.py")]
    }
    assert {str(path): size for path, size in sizes.items() if size > MAX_LINES} == {}
    ours = sorted(sizes[path] for path in sources(repo) if path.name != "__init__.py")
    assert ours[len(ours) // 2] <= 170, "the median file grows: one idea per file"


def test_no_drawer_for_everything(repo: Path) -> None:
    names = {path.stem for path in sources(repo)}
    assert names.isdisjoint({"utils", "util", "common", "helpers", "misc"})


LEFTOVERS = re.compile(
    r"\b(TODO|FIXME|XXX|HACK|NotImplementedError|NotImplemented|breakpoint\(|pdb\.set_trace)"
)


@pytest.mark.parametrize("folder", ["rlhfctl", "recipes", "completions", "benchmarks"])
def test_nothing_is_left_unfinished(repo: Path, folder: str) -> None:
    found = []
    for path in sorted((repo / folder).rglob("*")):
        if path.suffix in (".py", ".yaml", ".sh", ".bash") or path.name == "_rlhfctl":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if LEFTOVERS.search(line):
                    found.append(f"{path.relative_to(repo)}:{number}: {line.strip()}")
    assert found == []


def is_nothing(statement: ast.stmt) -> bool:
    """pass, a docstring, or `...`"""
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass)


def test_no_empty_bodies(repo: Path) -> None:
    """A function whose whole body is `pass` or `...` is a stub; a Protocol declares, which is its purpose."""
    stubs = []
    for path in sources(repo):
        tree = ast.parse(path.read_text())
        declared = {
            id(item)
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
            for item in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and id(node) not in declared:
                # A command without a body of its own has its help in the docstring.
                told = bool(node.decorator_list) and ast.get_docstring(node) is not None
                if not told and all(is_nothing(item) for item in node.body):
                    stubs.append(f"{path.relative_to(repo)}:{node.lineno}: {node.name}")
    assert stubs == []
