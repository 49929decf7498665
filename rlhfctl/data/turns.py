"""Turns as the formats write them, brought into one shape: {"role", "content": str | None, ...}.

Roles come out as system, user, assistant, tool or whatever else the row says (developer, ipython, ...): which
roles a template knows is the template check's business. Keys that a format adds to a turn (tool_calls, name,
weight, loss_weight) are kept.
"""

import json
import re
from typing import Any

from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.samples import Message

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
# Keys of a turn that say something beside its content; a response of text alone would lose them.
SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss_weight")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def messages_from(turns: Any, column: str) -> list[Message]:
    """OpenAI messages. A content may be a list of {type, text | value} parts, which are joined."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{column} must be a list of messages that is not empty")
    return [_message(turn, f"{column}[{index}]") for index, turn in enumerate(turns)]


def check_weights(messages: list[Message]) -> None:
    """`weight` (OpenAI's) and `loss_weight` of an assistant message: 0 is read but not trained on, 1 is as without."""
    for index, message in enumerate(messages):
        for key in WEIGHTS if message["role"] == "assistant" else ():
            if message.get(key) not in (None, 0, 1):
                raise BadRow(f"message {index + 1} has {key} {message[key]!r}: only 0 and 1 are trained")


def sharegpt_turns(turns: Any, column: str) -> list[Message]:
    """ShareGPT turns {from, value}; function_call turns become tool_calls of an assistant turn."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{column} must be a list of turns that is not empty")
    messages = []
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise BadRow(f"{where} has no 'from'")
        speaker, value = turn["from"].lower(), turn.get("value")
        extra = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
        if speaker == "function_call":
            calls = _tool_calls(value, where)
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **extra})
            continue
        if speaker not in SHAREGPT_ROLES:
            known = ", ".join([*SHAREGPT_ROLES, "function_call"])
            raise BadRow(f"{where} is from {turn['from']!r}, which is none of {known}")
        messages.append(_message({"role": SHAREGPT_ROLES[speaker], "content": value, **extra}, where))
    return messages


def hh_turns(text: Any, column: str) -> list[Message]:
    """A transcript "\\n\\nHuman: ...\\n\\nAssistant: ...". Turns are stripped, and must alternate."""
    if not isinstance(text, str):
        raise BadRow(f"{column} must be a text")
    before, *parts = HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise BadRow(f'{column} does not start with "\\n\\nHuman:"')
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            raise BadRow(f"{column} has two {speaker} turns in a row")
        where = f"{column}, turn {len(messages) + 1}"
        messages.append(_message({"role": role, "content": content.strip()}, where))
    return messages


def text_or_messages(value: Any, column: str) -> list[Message]:
    """A prompt: a text becomes one user message, a list is taken as messages."""
    if isinstance(value, str):
        return [_message({"role": "user", "content": value}, column)]
    return messages_from(value, column)


def response_text(value: Any, column: str) -> str:
    """A response: a text, one assistant message, or a list that holds exactly one; nothing but text is in it."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        messages = messages_from(value, column)
        if len(messages) != 1 or messages[0]["role"] != "assistant" or not messages[0]["content"]:
            raise BadRow(f"{column} must be a text or one assistant message")
        refuse_spoken(messages[0], column)
        value = messages[0]["content"]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"{column} is empty")
    if not isinstance(value, str):
        raise BadRow(f"{column} must be a text, not {type(value).__name__}")
    return value


def says_more(message: Message) -> bool:
    """Whether a message holds tool calls or reasoning beside its content."""
    return any(message.get(key) for key in SPOKEN)


def refuse_spoken(message: Message, column: str) -> None:
    """Raises BadRow for a message of which more than the content counts, where only the content is read."""
    lost = [key for key in SPOKEN if message.get(key)]
    if lost:
        raise BadRow(
            f"{column} holds {' and '.join(lost)} beside the text, of which nothing would be read: write it into "
            "the content, or drop the key"
        )


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not turn["role"]:
        raise BadRow(f"{where} has no 'role'")
    # Tables fill absent keys with None; a template that asks `is defined` must not see them.
    message = {key: value for key, value in turn.items() if value is not None}
    message["content"] = _content(turn.get("content"), where)
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise BadRow(f"{where}.tool_calls must be a list")
    if not (message["content"] or "").strip() and not calls and turn["role"] != "system":
        raise BadRow(f"{where} ({turn['role']}) has empty content")
    return message


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{where}.content must be a text or a list of parts, not {type(content).__name__}")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, dict) and part.get("type", "text") == "text":
            text = part.get("text") if part.get("text") is not None else part.get("value")
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRow(f"{where}.content has a part of type {kind!r}: only text parts are supported")
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except (TypeError, ValueError):
        raise BadRow(f"{where} is a function_call whose value is not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(f"{where} is a function_call without a name")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    return [{"type": "function", "function": function} for function in functions]
