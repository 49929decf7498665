"""The typed row that travels from the file to the reward."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # {"role": str, "content": str, ...}; extra keys (tool_calls, name, ...) are kept


@dataclass(slots=True)
class Sample:
    """One row of a data set, whatever file format it came from.

    messages: the prompt side of the row, or the whole conversation where the format does not split it (then
    `response` is None and assistant turns are inside messages). metadata: every other column, untouched.
    """

    id: str
    messages: list[Message]
    response: str | None = None
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: str = ""  # "file:row" for error messages
    judgement: "Judgement | None" = None

    def conversation(self) -> list[Message]:
        """All messages, the response included as the last assistant turn."""
        if self.response is None:
            return self.messages
        return [*self.messages, {"role": "assistant", "content": self.response}]

    def prompt(self) -> list[Message]:
        """The messages a policy answers: trailing assistant turns are not part of it."""
        messages = self.messages
        while messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        return messages


@dataclass(slots=True)
class Judgement:
    """What a row says about its conversation (data/judged.py); a part that it does not say is None.

    rejected: the whole conversation that lost against this one, by `margin`. reward: what the response is worth.
    steps: the response in parts, `separator` between them; step_labels: 1 right, 0 wrong, between: a probability, None:
    not labelled; one for each step. unmatched: the row holds steps that do not rebuild its response.
    """

    rejected: list[Message] | None = None
    margin: float | None = None
    reward: float | None = None
    steps: list[str] | None = None
    step_labels: list[float | None] | None = None
    separator: str = "\n"
    unmatched: bool = False


def content_id(content: Any) -> str:
    """Stable id of a row without one: a hash of its content, equal on every machine and in every order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
