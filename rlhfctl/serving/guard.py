"""Around every request: the key, and what it cost."""

import hmac
import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhfctl.serving.body import discard
from rlhfctl.serving.metrics import Metrics
from rlhfctl.serving.replies import Rejected, rejection

PATHS = ("/v1/rewards", "/get_reward", "/v1/info", "/health", "/metrics")
OPEN = ("/health",)  # answered without a key: it says nothing but that the service lives


class Guard:
    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self.app, self.api_key, self.metrics = app, api_key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            request = Request(scope, receive)
            if self.api_key is None or path in OPEN or authorised(request, self.api_key):
                await self.app(scope, receive, noted)
            else:
                await discard(request)
                wanted = Rejected(401, "a bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
                await rejection(wanted)(scope, receive, noted)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)


def authorised(request: Request, api_key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())
