"""What both protocols of a remote source need: its key, and a batch cut into requests."""

import os
from collections.abc import Iterator

from rlhfctl.errors import UsageError
from rlhfctl.recipe.sections import RemoteSource

ENVELOPE = 100  # bytes around the samples of a request
DIVISIBLE = (400, 413, 422)  # refusals that may be about one sample of a request

Part = list[tuple[int, bytes]]  # (place in the batch, the sample as JSON)


def key_of(section: RemoteSource) -> str | None:
    """The bearer token. Raises UsageError where its variable is not set."""
    if section.api_key_env is None:
        return None
    key = os.environ.get(section.api_key_env, "").strip()
    if not key:
        raise UsageError(
            f"reward.sources: api_key_env names {section.api_key_env}, which is not set in the environment"
        )
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"reward.sources: {section.api_key_env} holds characters that no HTTP header can carry; "
            "a key is plain ASCII"
        )
    return key


def divide(rows: Part, ids: list[str], size: int, max_body_bytes: int) -> Iterator[Part]:
    """Requests of at most `size` samples and `max_body_bytes`, none with one id twice (samples of one prompt share the
    id of its row)."""
    waiting = rows
    while waiting:
        part: Part = []
        taken: set[str] = set()
        later: Part = []
        length = ENVELOPE
        for place, row in waiting:
            fits = len(part) < size and length + len(row) + 1 <= max_body_bytes
            if ids[place] in taken or (part and not fits):
                later.append((place, row))
                continue
            part.append((place, row))
            taken.add(ids[place])
            length += len(row) + 1
        yield part
        waiting = later
