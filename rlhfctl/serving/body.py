"""Reading a request's body: never more of it than allowed, and never for longer."""

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from rlhfctl.serving.protocol import MAX_BODY_BYTES

SECONDS = 60.0  # for a whole body
# Read and dropped, so that a client that is still sending gets to see the answer.
DISCARDED = 8 * MAX_BODY_BYTES


class BadBody(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


async def read_body(request: Request) -> bytes:
    """Raises BadBody: 400 cut off, 408 too slow, 413 too large, 415 not JSON."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        await discard(request)
        raise BadBody(415, f"Content-Type must be application/json, not {kind}")
    too_large = BadBody(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer samples at once")
    try:
        async with asyncio.timeout(SECONDS):
            if announced(request) > MAX_BODY_BYTES:
                await discard(request)
                raise too_large
            parts, size = [], 0
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    parts.append(part)
                elif size > DISCARDED:
                    raise too_large
            if size > MAX_BODY_BYTES:
                raise too_large
            return b"".join(parts)
    except TimeoutError:
        raise BadBody(408, f"the body did not arrive within {SECONDS:g} s") from None
    except ClientDisconnect:
        raise BadBody(400, "the body was cut off") from None


async def discard(request: Request) -> None:
    """Read and drop what the client is still sending, within limits."""
    if "100-continue" in request.headers.get("expect", "").lower() or announced(request) > DISCARDED:
        return  # it waits for the answer, or it is too much
    size = 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > DISCARDED:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: the stream was read already
        return


def announced(request: Request) -> int:
    """Content-Length; 0 where there is none or it is no number."""
    given = request.headers.get("content-length", "")
    return int(given) if given.isdecimal() else 0
