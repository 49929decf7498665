"""The completion scripts, from the wheel or the checkout: `source <(rlhfctl --completion bash)`."""

from pathlib import Path

from rlhfctl.errors import UsageError

SCRIPTS = {"bash": "rlhfctl.bash", "zsh": "_rlhfctl", "fish": "rlhfctl.fish"}


def completion_script(shell: str) -> str:
    if shell not in SCRIPTS:
        raise UsageError(f"--completion knows {', '.join(SCRIPTS)}, not {shell}")
    package = Path(__file__).resolve().parent.parent
    inside = package / "_completions"  # in a wheel; in a checkout they lie beside the package
    folder = inside if inside.is_dir() else package.parent / "completions"
    return (folder / SCRIPTS[shell]).read_text(encoding="utf-8")
