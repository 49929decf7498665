"""OpenRLHF's form of a request: `query` is prompt and response as one text, `prompts` the prompt alone.

A model scores messages through its own template, so a prompt has to be told apart from its response and must not be
rendered already, through another model's template or its own: the text would go through a second one, and its score
would mean nothing. A prompt with special tokens or the opening of a turn in it is refused.
"""

import re
from typing import Any

from rlhfctl.data.templated import OPENINGS
from rlhfctl.rewards.match import SPECIAL
from rlhfctl.serving.protocol import OpenRlhfRequest

RENDERED = re.compile("|".join([SPECIAL.pattern, *map(re.escape, OPENINGS)]))
EDGES = re.compile(rf"^(?:\s*(?:{SPECIAL.pattern}))+|(?:(?:{SPECIAL.pattern})\s*)+$")


class Unusable(Exception):
    """A query that cannot be scored; `field` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field, self.problem = field, problem


def to_samples(request: OpenRlhfRequest, is_model: bool) -> list[dict[str, Any]]:
    """The samples of a request, ids "0", "1", ... Raises Unusable."""
    prompts: list[str | None] = list(request.prompts or []) or [None] * len(request.query)
    labels = request.labels or [None] * len(request.query)
    samples = []
    for place, (query, prompt, label) in enumerate(zip(request.query, prompts, labels, strict=True)):
        if is_model and prompt is None:
            raise Unusable(
                "prompts", "a reward model needs them, to tell the response of a query from its prompt"
            )
        text, response = divide(query, prompt, place)
        if is_model:
            refuse_rendered(text, place)
        messages = [{"role": "user", "content": text}] if prompt is not None else []
        samples.append(
            {"id": str(place), "messages": messages, "response": response, "label": label, "metadata": {}}
        )
    return samples


def divide(query: str, prompt: str | None, place: int) -> tuple[str, str]:
    """(prompt, response), without the special tokens at the ends that decoding leaves. No prompt: all is response."""
    if prompt is None:
        return "", EDGES.sub("", query)
    for text, start in ((query, prompt), (EDGES.sub("", query), EDGES.sub("", prompt))):
        if text.startswith(start):
            return start, EDGES.sub("", text[len(start) :])
    raise Unusable(f"query.{place}", f"does not start with prompts.{place}")


def refuse_rendered(prompt: str, place: int) -> None:
    found = RENDERED.search(prompt)
    if found is not None:
        raise Unusable(
            f"prompts.{place}",
            f"holds {found.group()}: it is rendered through a chat template already; send the plain prompt, or "
            "messages to /v1/rewards",
        )
