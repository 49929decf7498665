"""A reward server on loopback whose answers a test decides."""

import http.server
import json
import threading
from collections.abc import Callable
from typing import Any

INFO = {
    "schema": 1,
    "kind": "rules",
    "name": "fake",
    "version": "0",
    "fingerprint": "f" * 64,
    "granularities": ["sequence"],
}
Answer = Callable[["Fake", dict[str, Any]], Any]


class Fake:
    """A server on loopback whose answers to /v1/rewards a test decides: a JSON value, (status, headers, bytes), or
    None for hanging up without an answer."""

    def __init__(self, answer: Answer, info: Any = INFO) -> None:
        self.answer, self.info = answer, info
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(fake.info)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append(body)
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    given = fake.answer(fake, body)
                finally:
                    with fake._lock:
                        fake.at_once -= 1
                self.reply(given)

            def reply(self, given: Any) -> None:
                if given is None:
                    self.close_connection = True
                    return
                status, headers, content = (
                    given if isinstance(given, tuple) else (200, {}, json.dumps(given).encode())
                )
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                return None

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                return None  # clients of these tests hang up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
