"""Whose processor this is, and which library the user wants to multiply matrices: without torch, for checks too."""

import os
import re
from functools import lru_cache
from pathlib import Path

from rlhfctl.errors import UsageError

CHOICES = ("auto", "torch", "onednn", "packed")


def matmul_choice() -> str:
    """RLHFCTL_MATMUL; auto where it is not set. Raises UsageError."""
    choice = os.environ.get("RLHFCTL_MATMUL", "auto")
    if choice not in CHOICES:
        raise UsageError(f"RLHFCTL_MATMUL is {choice!r}: set it to one of {', '.join(CHOICES)}, or unset it")
    return choice


@lru_cache(maxsize=1)
def description() -> str:
    """What the kernel says of the processors; "" where it does not."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def amd_family() -> int | None:
    """The processor's family where AMD made it: 25 is Zen 3 and 4, 26 Zen 5."""
    found = re.search(r"^cpu family\s*:\s*(\d+)", description(), re.MULTILINE)
    return int(found[1]) if found and "AuthenticAMD" in description() else None


def packs_few_rows() -> bool:
    """Whether float32 products of a rollout's few rows are to go by matrices in MKL's own order of memory, which are
    copies (models/linear.py): on Intel's processors."""
    choice = matmul_choice()
    return choice == "packed" or (choice == "auto" and "GenuineIntel" in description())
