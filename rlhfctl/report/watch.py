"""The report of runs that go on, served on loopback: the same page, made again when the run's files change.

The page that is written to a file has no script. This one has a few lines of it: they ask for the page with the tag of
the one on show, and put the new body in its place; what was unfolded stays so.
"""

import errno
import hashlib
import json
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rlhfctl.errors import RlhfctlError, Unable
from rlhfctl.report.page import page
from rlhfctl.report.read import evaluations_of, read_run

SECONDS = 2
SCRIPT = """<script>
let tag = %s;
setInterval(async () => {
  try {
    const reply = await fetch("/", {headers: {"If-None-Match": tag}, cache: "no-store"});
    if (reply.status !== 200) return;
    tag = reply.headers.get("ETag");
    const open = [...document.querySelectorAll("details")].map(each => each.open), at = scrollY;
    document.body.innerHTML = new DOMParser().parseFromString(await reply.text(), "text/html").body.innerHTML;
    document.querySelectorAll("details").forEach((each, i) => { if (i in open) each.open = open[i]; });
    scrollTo(0, at);
  } catch (error) { document.title = "(not served any more)"; }
}, %d);
</script>"""
WATCHED = (
    "recipe.yaml",
    "status.json",
    "launch.json",
    "preflight.json",
    "metrics.jsonl",
    "samples.jsonl",
    "quarantine.jsonl",
)


def watch(runs: list[Path], port: int, ready: Callable[[str], None]) -> None:
    """Serve until KeyboardInterrupt. ready: gets the address. Raises Unable where the port is in use."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(runs))
    except OverflowError:
        raise Unable(f"--port {port} is no port: 0 to 65535") from None
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise Unable(f"port {port} of 127.0.0.1 {why}; choose another with --port") from None
    server.daemon_threads = True
    with server:
        ready(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever(poll_interval=0.2)


def tag_of(runs: list[Path]) -> str:
    """Changes when a file does that the page is made of."""
    seen = []
    evaluated = [path for run in runs for path in evaluations_of(run)]
    trees = [path.with_name("trees.jsonl") for path in evaluated]
    for path in [*(run / name for run in runs for name in WATCHED), *evaluated, *trees]:
        try:
            status = path.stat()
        except OSError:
            continue
        seen.append((str(path), status.st_mtime_ns, status.st_size))
    return '"' + hashlib.sha256(repr(seen).encode()).hexdigest()[:16] + '"'


def handler(runs: list[Path]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            # Another site's name that resolves to this machine must not read it.
            if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
                self.answer(403, "only as 127.0.0.1 or localhost")
            elif self.path != "/":
                self.answer(404, "there is one page: /")
            else:
                tag = tag_of(runs)
                if self.headers.get("If-None-Match") == tag:
                    self.answer(304)
                else:
                    self.answer(200, fresh_page(runs, tag), tag)

        def answer(self, code: int, text: str = "", tag: str | None = None) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            if code != 304:
                self.send_header("Content-Length", str(len(body)))
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is said: the terminal belongs to the person who watches."""
            return

    return Handler


def fresh_page(runs: list[Path], tag: str) -> str:
    """The page as it stands now; a sentence where the runs cannot be read at this moment."""
    script = SCRIPT % (json.dumps(tag), SECONDS * 1000)
    try:
        return page([read_run(path) for path in runs]).replace("</body>", script + "</body>")
    except (RlhfctlError, OSError) as error:
        return f"<!doctype html><body><p>{escape(str(error))}</p>{script}</body>"
