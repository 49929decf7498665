"""What a template leaves out of the data's own rows.

The other checks ask a template one question each, in a conversation of their own. Rows hold more: a second system
message, a developer, text beside a tool call, tools. Every part of a row is looked for in its render; where its text is
not there as it is written, a word is put in its place. A part whose word is nowhere in the render is lost. One that a
template trims, prints as JSON or cuts the reasoning of is not.

Reasoning is asked for in the last message alone: templates leave that of earlier turns out by design (T031).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.probe import Probe
from rlhfctl.templates.render import Message

Tools = list[dict[str, Any]]
WORD = "QXPARTXQ"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
KNOWN = {"user": "T007", "assistant": "T007", "system": "T011", "tool": "T016"}  # any other role: T018
OF_ONE_SHAPE, ROWS = 3, 60
SHORT = 12  # characters; a shorter text may stand in the render by chance


class Row(NamedTuple):
    origin: str
    messages: Sequence[Message]
    tools: Tools | None = None


class Part(NamedTuple):
    """id: the finding where it is lost. text: what to look for, "" where only the word tells. messages, tools: the row
    with the word in its place."""

    id: str
    name: str
    text: str
    messages: Sequence[Message]
    tools: Tools | None


def shapes(
    conversations: Iterable[tuple[str, Sequence[Message]]], tools: Mapping[str, Tools] | None = None
) -> list[Row]:
    """A few rows of every kind that the data holds: kinds differ in roles, in what follows what, and in what messages
    carry. tools: by origin."""
    tools = tools or {}
    counts: dict[object, int] = {}
    rows: list[Row] = []
    for origin, messages in conversations:
        shape = (frozenset(_shapes(messages)), bool(tools.get(origin)))
        counts[shape] = counts.get(shape, 0) + 1
        if counts[shape] <= OF_ONE_SHAPE:
            rows.append(Row(origin, messages, tools.get(origin)))
    rows.sort(key=lambda row: len(row.messages))  # stable; of many kinds the short ones
    return rows[:ROWS]


def _shapes(messages: Sequence[Message]) -> Iterator[tuple[object, ...]]:
    before = None
    for index, message in enumerate(messages):
        role, calls = str(message.get("role")), message.get("tool_calls")
        yield (
            role,
            before,
            index + 1 == len(messages),
            bool(message.get("content")),
            min(len(calls), 2) if isinstance(calls, list) else 0,
            any(message.get(key) for key in REASONING_KEYS),
        )
        before = role


def lost_parts(probe: Probe, rows: Iterable[Row], prompt: bool = False) -> dict[str, Found]:
    """Finding id -> the first part of a row that is lost. prompt: the last message of each row stands for an answer
    that is yet to be written, and the text that leads up to it is looked at."""
    found: dict[str, Found] = {}
    for row in rows:
        if prompt:
            row = row._replace(messages=row.messages[:-1])
        text = probe.text(row.messages, prompt, tools=row.tools)
        if text is None or not row.messages:  # a row that is refused is another finding's
            continue
        parts = list(_parts(row, prompt))
        said, rendered = [_bare(part.text) for part in parts], _bare(text)
        for part, sought in zip(parts, said, strict=True):
            if part.id in found:
                continue
            if len(sought) >= SHORT and rendered.count(sought) >= sum(each.count(sought) for each in said):
                continue
            asked = probe.text(part.messages, prompt, tools=part.tools)
            if asked is not None and WORD.lower() not in asked.lower():
                detail = f"{row.origin}: {part.name} is not in the render"
                found[part.id] = Found(detail, {"lost": part.name, "row": row.origin}, "error")
    return found


def unread_tools(rows: Iterable[Row]) -> Found | None:
    """A reward model is given messages, and no tools."""
    row = next((row for row in rows if row.tools), None)
    if row is None:
        return None
    detail = (
        f"{row.origin}: the tools column is not given to the reward model, which reads the messages alone"
    )
    return Found(detail, {"lost": "tools", "row": row.origin}, "error")


def _bare(text: str) -> str:
    return "".join(text.split())


def _parts(row: Row, prompt: bool) -> Iterator[Part]:
    messages = row.messages
    for index, message in enumerate(messages):
        role, content = str(message.get("role")), message.get("content")
        name = f"message {index + 1} ({role})"

        def part(
            id: str, what: str, text: str, change: Message, index: int = index, name: str = name
        ) -> Part:
            changed = [*messages[:index], {**messages[index], **change}, *messages[index + 1 :]]
            return Part(id, f"{what} of {name}", text, changed, row.tools)

        calls = message.get("tool_calls") or []
        if isinstance(content, str) and content.strip():
            id = "T016" if calls else KNOWN.get(role, "T018")
            yield part(id, f"the text{' beside the tool calls' if calls else ''}", content, {"content": WORD})
        for place, call in enumerate(calls if isinstance(calls, list) else []):
            for what, worded in _worded(call):
                change = {"tool_calls": [*calls[:place], worded, *calls[place + 1 :]]}
                yield part("T016", f"the {what} of a tool call", "", change)
        keys = [key for key in REASONING_KEYS if message.get(key)]
        if keys and role == "assistant" and index + 1 == len(messages) and not prompt:
            yield part("T032", f"the {keys[0]}", "", dict.fromkeys(keys, WORD))
    if row.tools:
        yield Part("T016", "the tools column", "", messages, [_named(tool) for tool in row.tools])


def _worded(call: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The call with another name, and with other arguments of the same type."""
    if not isinstance(call, dict):
        return
    function = call.get("function", call)
    if not isinstance(function, dict):
        return
    arguments = function.get("arguments")
    changes: list[tuple[str, dict[str, Any]]] = [("name", {"name": WORD})]
    if isinstance(arguments, dict) and arguments:
        changes.append(("arguments", {"arguments": {WORD: WORD}}))
    elif isinstance(arguments, str) and arguments.strip() not in ("", "{}"):
        changes.append(("arguments", {"arguments": json.dumps({WORD: WORD})}))
    for what, change in changes:
        worded = {**function, **change}
        yield what, {**call, "function": worded} if "function" in call else worded


def _named(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    return {**tool, "function": {**(function if isinstance(function, dict) else {}), "name": WORD}}
