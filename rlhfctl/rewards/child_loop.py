"""The other end of child.py: what runs inside the child."""

import io
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

Handler = Callable[[Any], Any]


def serve(prepare: Callable[[], Handler]) -> None:
    """Answers requests until the parent is gone. `prepare` runs first (imports); what it raises is reported.

    From here on file descriptor 1 is stderr and 0 is empty, for Python and C code alike: nothing that the
    handler prints or reads can touch the protocol.
    """
    requests_fd, answers_fd = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What is printed shows at once, and is not lost when the child is killed.
        sys.stdout.reconfigure(line_buffering=True)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    # Read in a thread of its own: a parent that dies closes the pipe, and the child must go even in mid-call.
    threading.Thread(target=_read, args=(requests_fd, requests), daemon=True).start()
    with os.fdopen(answers_fd, "w", encoding="utf-8") as answers:
        try:
            handler = prepare()
        except BaseException as error:
            _answer(
                answers, f"{type(error).__name__}: {error}" if not isinstance(error, NotReady) else str(error)
            )
            return
        _answer(answers, "ready")
        while True:
            _answer(answers, handler(json.loads(requests.get())))


class NotReady(Exception):
    """Raised by `prepare` with a sentence of its own."""


def _read(descriptor: int, requests: "queue.SimpleQueue[str]") -> None:
    with os.fdopen(descriptor, encoding="utf-8") as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


def _answer(answers: Any, value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
