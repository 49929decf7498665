"""The conversations of data, as the gate looks at them."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhfctl.data.encode import BadTools, tools_of
from rlhfctl.data.load import load_samples
from rlhfctl.data.samples import Sample
from rlhfctl.errors import Refused, UsageError
from rlhfctl.recipe.sections import DataSource
from rlhfctl.templates.files import read_text
from rlhfctl.templates.traits import Traits, traits

RENDERED = 100  # conversations that are rendered on both sides; traits are read off all of them
ANSWER = "It is 4."  # stands for the response that a prompt will get
Rows = Sequence[tuple[str, list[dict[str, Any]]]]


class Conversations(list[tuple[str, list[dict[str, Any]]]]):
    """(origin, messages) of each row. tools: what the `tools` columns hold, by origin."""

    tools: dict[str, list[dict[str, Any]]]

    def __init__(self) -> None:
        super().__init__()
        self.tools = {}


def read_conversations(path: str) -> Conversations:
    """Every usable row of a data file. Raises UsageError where there is none."""
    try:
        loaded = load_samples([DataSource(path=path)], max_bad_rows=10**9)
    except Refused as error:
        raise UsageError(error.message) from None
    return of_samples(loaded.samples, answered=False)


def of_samples(samples: Sequence[Sample], answered: bool) -> Conversations:
    """answered: prompts that a policy will answer; a plain answer stands in for its response."""
    result = Conversations()
    for sample in samples:
        messages = list(sample.conversation())
        if answered:
            messages = [*sample.prompt(), {"role": "assistant", "content": ANSWER}]
        if messages:
            origin = sample.origin or sample.id
            result.append((origin, messages))
            with suppress(BadTools):  # the row is left out, and D006 says why
                if tools := tools_of(sample):
                    result.tools[origin] = tools
    return result


def few(conversations: Rows) -> Rows:
    """At most RENDERED of them, evenly spaced."""
    return conversations[:: max(1, -(-len(conversations) // RENDERED))][:RENDERED]


def look(conversations: Rows) -> tuple[Rows, Traits]:
    """What is rendered, and what all of them hold."""
    return few(conversations), traits(conversations)


def read_messages(path: str) -> list[dict[str, Any]]:
    """A JSON list of messages. Raises UsageError."""
    try:
        value = json.loads(read_text(Path(path)))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}:{error.colno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply") from None
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not isinstance(value, list) or not value:
        raise UsageError(f'{path} is not a list of messages: [{{"role": "user", "content": "..."}}, ...]')
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"{path}: message {number} is not an object with a role")
        if "content" not in message and "tool_calls" not in message:
            raise UsageError(f"{path}: message {number} has no content")
        try:
            json.dumps(message, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{path}: message {number} holds half of a surrogate pair, which no tokenizer can encode"
            ) from None
    return value
