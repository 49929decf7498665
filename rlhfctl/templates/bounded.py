"""Rendering templates that nobody has vouched for: in a child process with a limit on CPU time and memory.

The jinja2 sandbox keeps a template from running python, not from looping for hours or filling the memory. One child
serves all templates of a process; it is forked on first use, loses every inherited file, and is killed and replaced
when a template goes past a limit. A template that did so once is not tried again.
"""

import json
import os
import resource
import select
import signal
import struct
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2

from rlhfctl.templates import render as engine
from rlhfctl.templates.render import LimitError, Message, RenderError

CPU_SECONDS = 2.0  # of one render: a legitimate one takes milliseconds
WALL_SECONDS = 60.0
MEMORY = 512 * 1024 * 1024  # bytes on top of what the process has when the child starts
_SIZE = struct.Struct("<I")
_KINDS: dict[str, type[jinja2.TemplateError]] = {
    "LimitError": LimitError,
    "RenderError": RenderError,
    "UndefinedError": jinja2.UndefinedError,
    "SecurityError": jinja2.exceptions.SecurityError,
}


class Sandbox:
    """`render` as in render.py, from a child process. Not to be shared between threads."""

    def __init__(self) -> None:
        self._child: tuple[int, int, int] | None = None  # pid, requests (write end), answers (read end)
        self._hostile: dict[str, str] = {}

    def render(
        self,
        source: str,
        messages: Sequence[Message],
        tokens: dict[str, str | None],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        clock: datetime | None = None,
        kwargs: dict[str, Any] | None = None,
        plain: bool = False,
    ) -> str:
        """Raises jinja2.TemplateError; LimitError where the child had to be killed."""
        if source in self._hostile:
            raise LimitError(self._hostile[source])
        moment = clock.isoformat() if clock is not None else None
        request = [source, list(messages), tokens, add_generation_prompt, tools, moment, kwargs, plain]
        try:
            answer = self._ask(json.dumps(request, default=str).encode())
        except _ChildDied as death:
            self._hostile[source] = str(death)
            raise LimitError(str(death)) from None
        if "text" in answer:
            return str(answer["text"])
        message = str(answer["error"])
        if answer["kind"] == "TemplateSyntaxError":
            raise jinja2.TemplateSyntaxError(message, int(answer["line"]))
        if answer["kind"] == "LimitError":
            self._hostile[source] = message
        raise _KINDS.get(str(answer["kind"]), jinja2.TemplateError)(message)

    def close(self) -> None:
        if self._child is not None:
            pid, requests, answers = self._child
            self._child = None
            os.close(requests)
            os.close(answers)
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._child is None:
            self._child = _start()
        _, requests, answers = self._child
        try:
            _write(requests, request)
            header = _read(answers, _SIZE.size)
            answer: dict[str, Any] = json.loads(_read(answers, _SIZE.unpack(header)[0]))
        except (_ChildDied, BrokenPipeError) as error:
            self.close()
            reason = str(error) if isinstance(error, _ChildDied) and str(error) else ""
            raise _ChildDied(
                reason
                or f"the template needs more than {CPU_SECONDS:g} s or {MEMORY // 2**20} MiB for one render"
            ) from None
        return answer


class _ChildDied(Exception):
    pass


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(_SIZE.pack(len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        ready, _, _ = select.select([descriptor], [], [], WALL_SECONDS)
        if not ready:
            raise _ChildDied(f"the template did not finish within {WALL_SECONDS:g} s")
        part = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not part:
            raise _ChildDied("")
        parts += part
    return bytes(parts)


def _start() -> tuple[int, int, int]:
    """Fork the child. It only ever runs the loop below and never returns."""
    engine.environment()  # built once, before the fork
    request_read, request_write = os.pipe()
    answer_read, answer_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(request_read)
        os.close(answer_write)
        return pid, request_write, answer_read
    try:
        _confine(request_read, answer_write)
        _serve()
    finally:
        os._exit(0)


def _confine(request_read: int, answer_write: int) -> None:
    """Requests become descriptor 0, answers descriptor 1; everything else is closed, signals are the default ones."""
    for number in (signal.SIGTERM, signal.SIGVTALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; its pipe then closes
    first, second = os.dup(request_read), os.dup(answer_write)
    os.dup2(first, 0)
    os.dup2(second, 1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.closerange(3, 1 << 20)
    with open("/proc/self/statm") as stream:
        size = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _serve() -> None:
    while True:
        try:
            size = _SIZE.unpack(_read_all(_SIZE.size))[0]
            request = json.loads(_read_all(size))
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _write(1, json.dumps(answer).encode())


def _read_all(size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(0, size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _answer(request: list[Any]) -> dict[str, Any]:
    source, messages, tokens, prompt, tools, moment, kwargs, plain = request
    clock = datetime.fromisoformat(moment) if moment is not None else None
    try:
        text = engine.render(
            source,
            messages,
            tokens,
            add_generation_prompt=prompt,
            tools=tools,
            clock=clock,
            kwargs=kwargs,
            plain=plain,
        )
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "TemplateSyntaxError", "error": error.message or "", "line": error.lineno}
    except jinja2.TemplateError as error:
        return {"kind": type(error).__name__, "error": error.message or str(error)}
    return {"text": text}
