"""What conversations of a data set really hold: it decides how bad a finding is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rlhfctl.preflight.finding import Severity
from rlhfctl.templates.probe import REASONING
from rlhfctl.templates.render import Message

RAISED: dict[str, tuple[str, Severity]] = {  # finding -> the trait that makes it matter, and how much
    "T010": ("system", "error"),
    "T011": ("system", "error"),
    "T014": ("repeated_roles", "error"),
    "P009": ("repeated_roles", "error"),
    "T016": ("tools", "error"),
    "T018": ("unknown_roles", "error"),
    "T030": ("several_answers", "error"),
    "T031": ("several_answers", "error"),
    "T032": ("reasoning", "error"),
    "P010": ("reasoning", "error"),
    "T034": ("outer_whitespace", "warning"),
}
POLICY_ONLY = {
    "T030",
    "T031",
}  # a reward model is asked once per conversation, with the history as it then is
LOWERED: dict[str, tuple[str, Severity]] = {  # without the trait anywhere in the data
    "T011": ("system", "warning"),
    "P007": ("system", "warning"),
    "P008": ("system", "warning"),
    "T019": ("system", "warning"),
}
ROLES = {"user", "assistant", "system", "tool", "developer", "function"}


@dataclass
class Traits:
    """rows: how many conversations were looked at. found: trait -> origin of the first row that has it."""

    rows: int = 0
    found: dict[str, str] = field(default_factory=dict)

    def has(self, trait: str) -> bool:
        return trait in self.found


def traits(conversations: Iterable[tuple[str, Sequence[Message]]]) -> Traits:
    """conversations: (origin, messages)."""
    result = Traits()
    for origin, messages in conversations:
        result.rows += 1
        for trait in _of(messages):
            result.found.setdefault(trait, origin)
    return result


def _of(messages: Sequence[Message]) -> list[str]:
    roles = [str(message.get("role")) for message in messages]
    spoken = [role for role in roles if role in ("user", "assistant")]
    texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    answers = [
        m["content"] for m in messages if m.get("role") == "assistant" and isinstance(m.get("content"), str)
    ]
    checks = {
        "system": "system" in roles or "developer" in roles,
        "repeated_roles": any(a == b for a, b in pairwise(spoken)) or spoken[:1] == ["assistant"],
        "tools": any("tool_calls" in message or message.get("role") == "tool" for message in messages),
        "unknown_roles": any(role not in ROLES for role in roles),
        "several_answers": roles.count("assistant") > 1,
        "reasoning": any(REASONING.search(text) for text in answers)
        or any(message.get("reasoning_content") or message.get("thinking") for message in messages),
        "outer_whitespace": any(text != text.strip() for text in texts),
    }
    return [trait for trait, there in checks.items() if there]
