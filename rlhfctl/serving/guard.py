"""Around every request: the key, and what it cost."""

import hmac
import time
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhfctl.serving.body import discard
from rlhfctl.serving.metrics import Metrics
from rlhfctl.serving.replies import Rejected, broken, rejection

PATHS = ("/v1/rewards", "/get_reward", "/v1/info", "/health", "/metrics")
OPEN = ("/health",)  # answered without a key: it says nothing but that the service lives


Handler = Callable[[Request], Awaitable[Response]]


class Guard:
    """direct: what answers a POST to these paths at once. FastAPI's own way there (its stacks of middleware, the search
    for a route, the solving of dependencies that these have none of) costs more than scoring a sample in a batch."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, metrics: Metrics, direct: Mapping[str, Handler]
    ) -> None:
        self.app, self.api_key, self.metrics, self.direct = app, api_key, metrics, direct

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
            if self.api_key is not None and path not in OPEN and not authorised(request, self.api_key):
                await discard(request)
                wanted = Rejected(401, "a bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
                await rejection(wanted)(scope, receive, noted)
            elif path in self.direct and scope["method"] == "POST":
                await answer(self.direct[path], request, noted)
            else:
                await self.app(scope, receive, noted)
        finally:
            self.metrics.answered(path, status, time.perf_counter() - started)


async def answer(handler: Handler, request: Request, send: Send) -> None:
    """A failure of ours is answered, and raised for the log."""
    try:
        response = await handler(request)
    except Rejected as error:
        response = rejection(error)
    except Exception as error:
        await broken(error)(request.scope, request.receive, send)
        raise
    await response(request.scope, request.receive, send)


def authorised(request: Request, api_key: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())
