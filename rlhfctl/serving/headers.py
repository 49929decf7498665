"""Limits on a request before it is one: uvicorn waits for the end of its headers for ever, and keeps all of them.

A client that connects and stalls, or sends headers without end, would hold a connection each; some thousands of them
are all that a process has.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

SECONDS = 20.0  # for the headers of a request, from the connection's start or from their first byte
MAX_BYTES = 1 << 16

_Protocol: Any = AutoHTTPProtocol  # httptools where it is installed, else h11


class BoundedHeaders(_Protocol):
    """uvicorn's protocol; headers that are late get a 408, too many a 431, and both the end of the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._received = 0
        self._limit: asyncio.TimerHandle | None = None
        self._start()

    def data_received(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n")  # headers may come whole in one piece, with the body behind them
        if not self._in_request() and self._received + (len(data) if end < 0 else end) > MAX_BYTES:
            self._end(b"431 Request Header Fields Too Large")
            return
        super().data_received(data)
        if self._in_request():
            self._stop()
            return
        self._received += len(data)
        if self._limit is None and not self.transport.is_closing():
            self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start(self) -> None:
        self._limit = self.loop.call_later(SECONDS, self._end, b"408 Request Timeout")

    def _stop(self) -> None:
        self._received = 0
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _end(self, status: bytes) -> None:
        self._stop()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)
            self.transport.close()
