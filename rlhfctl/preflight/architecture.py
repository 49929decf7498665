"""W025: an architecture that packs of rows would be wrong for, by its configuration alone."""

from typing import Any

from rlhfctl.architectures import scaled, unsupported
from rlhfctl.preflight.finding import Finding


def check_architecture(key: str, path: str, config: dict[str, Any], head: bool) -> list[Finding]:
    """head: whether its logits are used, a language model's."""
    found = unsupported(config) or (scaled(config) if head else None)
    if found is None:
        return []
    kind, reason = found
    return [
        Finding(
            "W025",
            "error",
            f"{key}: this model of type {kind} is not supported",
            f"{path}: {reason}",
            fix=f"set {key} to a model of another family: docs/preflight.md lists those that were tried",
        )
    ]
