"""The command that installs an extra beside this rlhfctl, whatever installed it."""

import sys
from pathlib import PurePath


def install_line(extra: str, prefix: str | None = None) -> str:
    """`extra`: one name or several, joined by commas.

    A user of pipx or uv has no pip of the tool's environment on PATH: `pip install` there would go elsewhere.
    """
    parts = PurePath(prefix or sys.prefix).parts
    wanted = f"'rlhfctl[{extra}]'"
    if parts[-3:-1] == ("pipx", "venvs"):
        return f"pipx runpip {parts[-1]} install {wanted}"
    if parts[-3:-1] == ("uv", "tools"):
        return f"uv pip install --python '{PurePath(*parts, 'bin', 'python')}' {wanted}"
    return f"pip install {wanted}"
