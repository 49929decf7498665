"""What the contract names and this version does not do: refused as such, never as an unknown key.

A line leaves this file when its feature arrives in sections.py or tasks.py. `*` stands for any list index.
"""

from rlhfctl.recipe.yaml12 import Path

KEYS = ("policy.attention",)

VALUES: dict[str, tuple[str, ...]] = {}


def pattern(path: Path) -> str:
    return ".".join("*" if isinstance(part, int) else part for part in path)


def is_key(path: Path) -> bool:
    return pattern(path) in KEYS


def is_value(path: Path, value: object) -> bool:
    return isinstance(value, str) and value in VALUES.get(pattern(path), ())
