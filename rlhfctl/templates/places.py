"""Where a response and its steps are among the tokens that a reward model reads."""

from collections.abc import Sequence

from rlhfctl.templates.bridge import Bridged
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.render import Span


class NotFound(ValueError):
    """The response does not stand in the rendered text as it was given."""


def response_places(encoder: ChatEncoder, bridged: Bridged) -> list[int]:
    """Indices of the response's tokens, from its first character to the end of what is read."""
    offsets, start = token_offsets(bridged), response_start(encoder, bridged)[0]
    first = next(index for index, (_, end) in enumerate(offsets) if end > start)
    return list(range(first - bridged.dropped, len(bridged.ids)))


def step_places(encoder: ChatEncoder, bridged: Bridged, steps: Sequence[str], before: int = 0) -> list[int]:
    """For each step the index of the token that holds its last character, of those that the template leaves.

    before: characters of the answer in front of the first step."""
    offsets, content = token_offsets(bridged), answer(bridged)
    first, shown = response_start(encoder, bridged)
    start = first - content.find(shown)  # where it would begin if nothing were trimmed
    places, position = [], before
    for step in steps:
        position = content.find(step, position)
        if position < 0:
            raise NotFound("a step does not stand in the response")
        position += len(step)
        # Whitespace at a step's end may be read as part of the next token.
        last = min(start + position, first + len(shown)) - 1
        places.append(next(index for index, (_, end) in enumerate(offsets) if end > last) - bridged.dropped)
    return places


def split_steps(response: str, separator: str) -> list[str]:
    """The steps of a response as the separator cuts it; empty ones are none."""
    return [part for part in response.split(separator) if part.strip()] or [response]


def token_offsets(bridged: Bridged) -> list[Span]:
    """Character spans in bridged.text, of the tokens before `bridged.dropped` too. Raises NotFound where the ids are
    not those of the text."""
    if bridged.offsets is not None:
        return bridged.offsets
    if bridged.encoding is None:
        raise NotFound("its tokens are not those of the text that the template makes")
    return list(bridged.encoding.offsets)


def answer(bridged: Bridged) -> str:
    """The last answer as the template was given it, a reasoning block that the policy's prompt opened included."""
    content = bridged.messages[-1]["content"]
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return str(content)


def response_start(encoder: ChatEncoder, bridged: Bridged) -> tuple[int, str]:
    """Where the last answer stands in bridged.text, and the text of it that stands there.

    It is what ends where the template's own end begins: an answer of one letter stands inside a marker too."""
    content = answer(bridged)
    text, after = bridged.text, bridged.after
    forms = [form for form in (content, content.rstrip(), content.lstrip(), content.strip()) if form]
    for form in forms:
        if after is not None and text.endswith(form + after):
            return len(text) - len(after) - len(form), form
    spans = encoder.spans(bridged.messages, "last_assistant")[1]
    for form in forms if spans else []:
        start = text.find(form, spans[0][0])
        if start >= 0:
            return start, form
    raise NotFound("the chat template does not show the response as it is")
