"""What may be done to messages so that a template takes them: each step says what it did."""

from collections.abc import Sequence

from jinja2 import TemplateError

from rlhfctl.templates.render import Message

JOIN = "\n\n"


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Leading system messages become the beginning of the first user turn, or a user turn where there is none."""
    count = next((i for i, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    rest = list(messages[count:])
    if not count:
        return rest
    text = JOIN.join(_text(message) for message in messages[:count])
    place = next((i for i, message in enumerate(rest) if message.get("role") == "user"), None)
    if place is None:
        return [{"role": "user", "content": text}, *rest]
    rest[place] = {**rest[place], "content": _joined(text, rest[place].get("content"))}
    return rest


def merge_roles(messages: Sequence[Message]) -> list[Message]:
    """Consecutive user turns become one, and so do answers without tool calls."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        same = last is not None and last.get("role") == message.get("role") in ("user", "assistant")
        if last is None or not same or "tool_calls" in {**last, **message}:
            merged.append(dict(message))
        else:
            merged[-1] = {**last, "content": _joined(_text(last), message.get("content"))}
    return merged


def drop_tools(messages: Sequence[Message]) -> list[Message]:
    """Tool results become user turns, tool calls are left out."""
    result = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if plain.get("role") == "tool":
            plain = {"role": "user", "content": plain.get("content")}
        result.append(plain)
    return result


def wrap_content(messages: Sequence[Message]) -> list[Message]:
    """String content as a list of one text part."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m.get("content"), str)
        else dict(m)
        for m in messages
    ]


def join_content(messages: Sequence[Message]) -> list[Message]:
    """List content as the text of its parts. Raises TemplateError for a part that is no text."""
    return [
        {**m, "content": "".join(_part(part) for part in m["content"])}
        if isinstance(m.get("content"), list)
        else dict(m)
        for m in messages
    ]


def set_system(messages: Sequence[Message], system: str) -> list[Message]:
    """system: inherit (what the data has) | none (no system message) | the text of the one system message."""
    if system == "inherit":
        return list(messages)
    rest = [message for message in messages if message.get("role") != "system"]
    return rest if system == "none" else [{"role": "system", "content": system}, *rest]


def _part(part: object) -> str:
    text = part
    if isinstance(part, dict):
        text = part.get("text") if part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise TemplateError(f"content has a part of type {kind!r}: this chat template takes text only")
    return text


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _joined(text: str, content: object) -> object:
    if isinstance(content, list):
        return [{"type": "text", "text": text + JOIN}, *content]
    return text + JOIN + content if isinstance(content, str) and content else text
