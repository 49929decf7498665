"""The servers of a remote source: which one is asked, what is tried again, and what they have to agree on.

Tried again, with exponential backoff and jitter: no connection, no answer in time, 408, 425, 429, 5xx, and an answer
that is no JSON (cut off, or a proxy's page). Another server that is not known to be down is asked at once. Everything
else is the same the next time, so it is not tried again.
"""

import ipaddress
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from rlhfctl.errors import Refused
from rlhfctl.serving.protocol import SCHEMA, Info, problems

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
CONNECT_SECONDS = 5.0
HANDSHAKE_SECONDS = 10.0  # for all tries on one server
MAX_REPLY_BYTES = 256 * 2**20
LONGEST_PAUSE = 30.0


class Transient(Exception):
    """Worth another try. late: no answer in time. retry_after: seconds the server asked for. status: of HTTP, or 0."""

    def __init__(self, message: str, late: bool = False, retry_after: float = 0.0, status: int = 0) -> None:
        super().__init__(message)
        self.late, self.retry_after, self.status = late, retry_after, status


class Permanent(Exception):
    """The same the next time. status: the HTTP status, 0 for an answer that breaks the protocol."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Server:
    url: str
    failures: int = 0
    down_until: float = 0.0  # time.monotonic()


@dataclass(slots=True)
class Servers:
    """Thread-safe. timeout: seconds for one request; retries: tries after the first."""

    urls: list[str]
    api_key: str | None
    timeout: float
    retries: int
    max_in_flight: int
    all: list[Server] = field(init=False)
    _client: httpx.Client = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: int = 0

    def __post_init__(self) -> None:
        self.all = [Server(url.rstrip("/")) for url in self.urls]
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        self._client = httpx.Client(
            headers=headers,
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=self.max_in_flight, keepalive_expiry=30
            ),
            # A proxy of the environment cannot reach this machine's own addresses.
            trust_env=not all(is_local(url) for url in self.urls),
        )

    def close(self) -> None:
        self._client.close()

    def post(self, path: str, body: bytes, deadline: float, retries: int | None = None) -> Any:
        """The JSON answer of the first server that gives one. Raises Transient when tries or time are used up.

        retries: tries after the first, default those of all requests."""

        def attempt() -> Any:
            server = self._choose()
            try:
                answer = self._request(server, "POST", path, body, deadline)
            except Transient as error:
                self._failed(server, error)
                raise
            server.failures, server.down_until = 0, 0.0
            return answer

        return self._retrying(deadline, len(self.all) > 1, retries)(attempt)

    def handshake(self, server: Server, deadline: float) -> Info:
        """Raises Transient where it does not answer, Permanent where it is no reward service of this schema."""
        retrying = self._retrying(deadline, failover=False)
        answer = retrying(lambda: self._request(server, "GET", "/v1/info", None, deadline))
        if isinstance(answer, dict) and answer.get("schema") not in (None, SCHEMA):
            raise Permanent(f"speaks schema {answer['schema']}, this trainer schema {SCHEMA}")
        try:
            return Info.model_validate(answer)
        except ValidationError as error:
            first = problems(error)[0]
            raise Permanent(f"gives no usable /v1/info: {first['field']}: {first['problem']}") from None

    def greet(self, server: Server, deadline: float) -> None:
        """For servers without a handshake: any answer to HTTP will do. Raises Transient, Permanent."""

        def attempt() -> None:
            try:
                self._exchange("GET", server.url, None, min(deadline, time.monotonic() + self.timeout))
            except httpx.HTTPError as error:
                raise Transient(f"{server.url}: {error or type(error).__name__}") from None

        self._retrying(deadline, failover=False)(attempt)

    def _retrying(self, deadline: float, failover: bool, retries: int | None = None) -> Retrying:
        tries = 1 + (self.retries if retries is None else retries)
        backoff = wait_random_exponential(multiplier=0.25, max=8)

        def stop(state: RetryCallState) -> bool:
            return state.attempt_number >= tries or time.monotonic() >= deadline

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            now = time.monotonic()
            if failover and any(server.down_until <= now for server in self.all):
                return 0.0
            asked = error.retry_after if isinstance(error, Transient) else 0.0
            return max(0.0, min(max(backoff(state), asked), LONGEST_PAUSE, deadline - now))

        return Retrying(retry=retry_if_exception_type(Transient), stop=stop, wait=wait, reraise=True)

    def _choose(self) -> Server:
        """In turn among those not known to be down; if all are, the one that may be back first."""
        with self._lock:
            now = time.monotonic()
            order = [self.all[(self._next + k) % len(self.all)] for k in range(len(self.all))]
            self._next += 1
            up = [server for server in order if server.down_until <= now]
            return up[0] if up else min(order, key=lambda server: server.down_until)

    def _failed(self, server: Server, error: Transient) -> None:
        with self._lock:
            server.failures += 1
            server.down_until = time.monotonic() + max(
                error.retry_after, min(0.5 * 2**server.failures, LONGEST_PAUSE)
            )

    def _request(self, server: Server, method: str, path: str, body: bytes | None, deadline: float) -> Any:
        ends = min(deadline, time.monotonic() + self.timeout)
        try:
            status, headers, content = self._exchange(method, server.url + path, body, ends)
        except httpx.TimeoutException as error:
            raise Transient(f"{server.url}: no answer in time ({type(error).__name__})", late=True) from None
        except httpx.TransportError as error:
            raise Transient(f"{server.url}: {error or type(error).__name__}") from None
        except httpx.HTTPError as error:
            raise Permanent(f"{server.url}: {error or type(error).__name__}") from None
        if status in TRANSIENT:
            said = f"{server.url}: HTTP {status}{told(content)}"
            pause = seconds(headers.get("retry-after"))
            raise Transient(said, status in (408, 504), pause, status)
        if status != 200:
            raise Permanent(f"{server.url}: HTTP {status}{told(content)}", status)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Transient(f"{server.url}: the answer is not JSON: {content[:60]!r}") from None

    def _exchange(
        self, method: str, url: str, body: bytes | None, ends: float
    ) -> tuple[int, httpx.Headers, bytes]:
        """httpx counts each read for itself; a server that sends a byte now and then is held to `ends` here."""
        left = max(0.05, ends - time.monotonic())
        limits = httpx.Timeout(left, connect=min(left, CONNECT_SECONDS))
        headers = {"Content-Type": "application/json"} if body is not None else {}
        with self._client.stream(method, url, content=body, headers=headers, timeout=limits) as reply:
            content = bytearray()
            for part in reply.iter_bytes():
                content += part
                if time.monotonic() > ends:
                    raise httpx.ReadTimeout("the answer came too slowly")
                if len(content) > MAX_REPLY_BYTES:
                    raise httpx.DecodingError(f"the answer is larger than {MAX_REPLY_BYTES} bytes")
            return reply.status_code, reply.headers, bytes(content)


def agree(servers: Servers) -> tuple[Info, dict[str, str]]:
    """The handshake with every server: what they all are, and by url why one did not answer.

    Raises Refused where none answers, one is no reward service of this schema, or two differ."""
    silent: dict[str, str] = {}
    infos: dict[str, Info] = {}
    for server in servers.all:
        try:
            infos[server.url] = servers.handshake(server, time.monotonic() + HANDSHAKE_SECONDS)
        except Transient as error:
            silent[server.url] = str(error)
        except Permanent as error:
            said = str(error).removeprefix(f"{server.url}: ")
            raise Refused(f"the reward server {server.url} failed its handshake: {said}") from None
    if not infos:
        raise Refused(
            f"no reward server answers its handshake: {'; '.join(silent.values())}; start one "
            "(`rlhfctl serve-rm MODEL --port N`) or correct reward.sources.*.url"
        )
    (first, info), *others = infos.items()
    for url, other in others:
        if other.fingerprint != info.fingerprint:
            raise Refused(
                f"the reward servers {first} and {url} score with different models: {info.name} "
                f"({info.fingerprint[:12]}) and {other.name} ({other.fingerprint[:12]})"
            )
    return info, silent


def reachable(servers: Servers) -> dict[str, str]:
    """By url why a server does not answer. Raises Refused where none does."""
    silent: dict[str, str] = {}
    for server in servers.all:
        try:
            servers.greet(server, time.monotonic() + HANDSHAKE_SECONDS)
        except Transient as error:
            silent[server.url] = str(error)
    if len(silent) == len(servers.all):
        raise Refused(f"no reward server answers: {'; '.join(silent.values())}")
    return silent


def told(content: bytes) -> str:
    """The message of an error answer, shortened."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = content.decode(errors="replace")
    text = " ".join(str(message).split())[:300]
    return f": {text}" if text else ""


def seconds(retry_after: str | None) -> float:
    """Retry-After in seconds; a date, or nothing, is 0."""
    return min(float(retry_after), LONGEST_PAUSE) if retry_after and retry_after.isdecimal() else 0.0


def is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
