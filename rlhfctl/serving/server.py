"""The socket, uvicorn, and an orderly end."""

import errno
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from rlhfctl.errors import Unable, UsageError
from rlhfctl.serving.app import create_app
from rlhfctl.serving.headers import BoundedHeaders
from rlhfctl.serving.matching import Rows
from rlhfctl.serving.scorers import Served

BACKLOG = 2048
DRAIN_SECONDS = 120  # what requests that are being answered get after SIGTERM
KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection, so that none is closed under a request
# Python's default of 5 ms is how long the thread that scores could keep the one that answers waiting, at every turn.
SWITCH_SECONDS = 0.0005


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before a model is loaded. Raises Unable where the port is in use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address: {error}") from None
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise Unable(f"port {port} of {host} {why}; choose another with --port") from None
    return opened


class Announcing(uvicorn.Server):
    """Tells when it answers, and ends where that could not be told."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], bool]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self._ready():
            self.should_exit = True


def settings(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedHeaders,
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
        proxy_headers=False,  # nothing here asks where a request came from
    )


def serve(
    served: Served,
    opened: socket.socket,
    api_key: str | None,
    max_batch: int,
    ready: Callable[[], bool],
    rows: Rows | None = None,
) -> None:
    """Until SIGTERM or SIGINT: then no new connection is taken, and what was asked before is answered."""
    config = settings(create_app(served, api_key, max_batch, rows))
    # uvicorn raises the signals that ended it once more when it is done: that is not an error here.
    before: dict[int, Any] = {
        number: signal.signal(number, ended) for number in (signal.SIGTERM, signal.SIGINT)
    }
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        Announcing(config, ready).run(sockets=[opened])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ended(signum: int, frame: FrameType | None) -> None:
    """Drained and closed: nothing is left to do."""
    return None
