"""Prompts that have been through a chat template already: a second one around them would not be what anyone samples.

ChatML up to the open assistant turn is taken apart into its messages; other texts with a template's tokens are refused.
"""

import re
from collections.abc import Sequence

from rlhfctl.data.samples import Message, Sample
from rlhfctl.errors import Refused

CHATML_TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>\n?", re.DOTALL)
CHATML_OPEN = re.compile(r"<\|im_start\|>assistant\n?\Z")
# Openings of turns that no plain question holds, whatever the policy's own tokens are.
OPENINGS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "[INST]",
    "<|user|>",
    "<\uff5cUser\uff5c>",
)
SHORTEST = 3  # a special token of fewer characters may well be text


def chatml_turns(text: str) -> list[Message] | None:
    """The messages of a ChatML prompt that ends with an open assistant turn; None for any other text."""
    opened = CHATML_OPEN.search(text)
    if opened is None:
        return None
    messages: list[Message] = []
    place = 0
    while place < opened.start():
        turn = CHATML_TURN.match(text, place, opened.start())
        if turn is None:
            return None
        messages.append({"role": turn[1], "content": turn[2]})
        place = turn.end()
    return messages if any(message["role"] == "user" for message in messages) else None


def refuse_templated(sample: Sample, special: Sequence[str]) -> None:
    """special: the policy's special tokens."""
    tokens = [token for token in (*special, *OPENINGS) if len(token) >= SHORTEST]
    for message in sample.prompt():
        content = message.get("content")
        if message.get("role") == "assistant" or not isinstance(content, str):
            continue
        found = next((token for token in tokens if token in content), None)
        if found is not None:
            raise Refused(
                f"{sample.origin}: its prompt holds {found!r}: it has been through a chat template already, and the "
                "policy's own would be put around it; give the plain question, or messages with roles"
            )
