"""Why something did not come from the Hugging Face hub, and what to do: the cases that people meet, told apart."""

import os
from collections.abc import Iterator

from rlhfctl.errors import is_disk_full

UNREACHABLE = {
    "ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "ProxyError", "LocalEntryNotFoundError",
}  # fmt: skip


def hub_failure(error: BaseException, name: str) -> tuple[str, str]:
    """(cause, fix) of an exception of huggingface_hub or datasets, which wrap each other's."""
    if any(is_disk_full(each) for each in chain(error)):
        return (
            "the disk of its cache is full",
            "free some space there, or set HF_HOME to a directory on another disk",
        )
    names = [type(each).__name__ for each in chain(error)]
    status = next((code for each in chain(error) if (code := status_of(each)) is not None), None)
    if "GatedRepoError" in names or "is a gated dataset" in str(error):
        return (
            f"{name} is gated: the hub gives it to those who accepted its terms",
            f"accept them at https://huggingface.co/{name}, then set HF_TOKEN or run `hf auth login`",
        )
    if "OfflineModeIsEnabled" in names or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE"):
        return (
            "HF_HUB_OFFLINE is set, and it is not in the local cache",
            "unset it, or give a local directory",
        )
    if {"RepositoryNotFoundError", "DatasetNotFoundError"} & set(names) or status in (401, 404):
        return (
            f"the hub has no {name}, or it is private",
            "check the spelling; a private one needs HF_TOKEN or `hf auth login`",
        )
    if status == 429 or (status is not None and status >= 500):
        return f"the hub answered with {status}", "try again later"
    if UNREACHABLE & set(names):
        return (
            "the hub cannot be reached",
            "check the network and HTTPS_PROXY, set HF_ENDPOINT to a mirror, or download it on a machine with a "
            "network and set HF_HOME to where it lies",
        )
    said = str(error).strip().splitlines()
    return said[0] if said else type(
        error
    ).__name__, "give a local directory, or download it on a machine with a network"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its cause, the cause's cause, ..."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None
