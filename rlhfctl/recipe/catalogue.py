"""The recipes that come with rlhfctl, by name: `quickstart/ppo` is recipes/quickstart/ppo.yaml. Stdlib only."""

from pathlib import Path

MODELINE = (
    "# yaml-language-server: $schema="  # editors complete and check the keys by the schema that it names
)
PACKAGE = Path(__file__).resolve().parent.parent


def shipped_root() -> Path:
    """In a wheel the package carries them; in a checkout they lie beside the package."""
    inside = PACKAGE / "_recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped_names() -> list[str]:
    root = shipped_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def shipped_path(name: str) -> Path | None:
    """The file of a shipped recipe, or None. Names are compared whole: `../x` is no name."""
    return shipped_root() / f"{name}.yaml" if name in shipped_names() else None


def header(path: Path) -> list[str]:
    """The comment a recipe starts with, without the marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(MODELINE):
            lines.append(line[1:].strip())
    return lines


def to_copy(path: Path) -> str:
    """The text of a shipped recipe, its schema named so that a copy anywhere finds it."""
    text = path.read_text(encoding="utf-8")
    if not text.startswith(MODELINE):
        return text
    relative, rest = text.removeprefix(MODELINE).split("\n", 1)
    return f"{MODELINE}{(path.parent / relative).resolve()}\n{rest}"


def summary(path: Path) -> str:
    """The first sentence of a recipe's header."""
    text = " ".join(header(path))
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]
