"""Nodes with different libraries are refused before training: they need not compute the same."""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from rlhfctl.errors import Unable
from rlhfctl.trainers.distributed import gather_lists

PACKAGES = ("rlhfctl", "torch", "transformers", "deepspeed", "peft", "bitsandbytes")


def refuse_other_versions() -> None:
    """A collective. Raises Unable on every rank where two nodes differ."""
    problem = difference(gather_lists([(os.environ.get("RLHFCTL_NODE", ""), versions())]))
    if problem is not None:
        raise Unable(problem)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def difference(ranks: Sequence[tuple[str, dict[str, str]]]) -> str | None:
    """One sentence on the first package that differs. ranks: of each its node and its versions by package."""
    first, ours = ranks[0]
    for node, theirs in ranks:
        for name in PACKAGES:
            if theirs.get(name) != ours.get(name):
                return (
                    f"the nodes have different versions of {name}: {ours.get(name)} on {first or 'rank 0'}, "
                    f"{theirs.get(name)} on {node or 'another rank'}: install the same on all of them"
                )
    return None
