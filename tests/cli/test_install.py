"""What a message says to install must work where this rlhfctl lives."""

import pytest

from rlhfctl.install import install_line


@pytest.mark.parametrize(
    ("prefix", "line"),
    [
        ("/home/a/.venv", "pip install 'rlhfctl[train]'"),
        (
            "/home/a/.local/share/pipx/venvs/rlhfctl",
            "pipx runpip rlhfctl install 'rlhfctl[train]'",
        ),
        (
            "/home/a b/.local/share/uv/tools/rlhfctl",
            "uv pip install --python '/home/a b/.local/share/uv/tools/rlhfctl/bin/python' 'rlhfctl[train]'",
        ),
    ],
)
def test_by_what_installed_it(prefix: str, line: str) -> None:
    assert install_line("train", prefix) == line
