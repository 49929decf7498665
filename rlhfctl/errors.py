"""Exceptions that end a command with a documented exit code and one sentence (see cli/exit_codes.py).

Anything else that escapes is a bug: exit 1, and the traceback goes to the log.
"""

import errno
import os
from pathlib import Path

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PATH = {errno.ENAMETOOLONG: "the name is too long", errno.ELOOP: "its links go in a circle"}


class RlhfctlError(Exception):
    """Base: `message` is one sentence that says what, where and what to do; `exit_code` is the contract's."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RunFailed(RlhfctlError):
    """The run started and could not go on."""

    exit_code = 1


class UsageError(RlhfctlError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class TemplateMismatch(RlhfctlError):
    exit_code = 3


class Unable(RlhfctlError):
    """This machine cannot run it: missing extra, no device, port in use, too little memory or disk."""

    exit_code = 4


class Refused(RlhfctlError):
    """A preflight check refused: data, loss mask, reward, weights, shapes."""

    exit_code = 5


class Interrupted(RlhfctlError):
    """A signal asked the run to stop; a checkpoint was kept."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


def is_disk_full(error: BaseException) -> bool:
    """Whether a failed write means no space: torch and safetensors hide the errno in their own exceptions."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    text = str(error)
    return any(
        sign in text
        for sign in (
            "No space left on device",
            "File too large",
            "quota exceeded",
            "PytorchStreamWriter failed",
        )
    )


def impossible_path(error: BaseException) -> str | None:
    """The sentence for a path that no file can have; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in NO_PATH:
        return None
    return f"{error.filename or 'a path'} cannot be a file or a directory: {NO_PATH[error.errno]}"


def closed_path(error: BaseException) -> str | None:
    """The sentence for a path in a directory that is closed to this user; None for any other error."""
    if not isinstance(error, PermissionError) or error.filename is None:
        return None
    return f"{os.fsdecode(error.filename)} is closed to this user: permission denied"


def unwritable(path: Path, error: OSError) -> RlhfctlError:
    """Why a file that was asked for is not there, in one sentence."""
    if is_disk_full(error):
        return Unable(
            f"cannot write {path}: the disk is full; free some space, or name a place on another disk"
        )
    return UsageError(f"cannot write {path}: {error.strerror or error}")
