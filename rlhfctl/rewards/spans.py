"""Scores of steps and tokens as character spans of the response that they are about."""

from collections.abc import Sequence

from rlhfctl.rewards.outcome import Span
from rlhfctl.templates.bridge import Bridged
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.places import answer, response_start, token_offsets


def step_spans(response: str, separator: str, scores: Sequence[float]) -> list[Span]:
    """One span a step, as templates/places.py splits them."""
    bounds, start = [], 0
    for part in response.split(separator):
        if part.strip():
            bounds.append((start, start + len(part)))
        start += len(part) + len(separator)
    bounds = bounds or [(0, len(response))]
    return [Span(low, high, score) for (low, high), score in zip(bounds, scores, strict=True)]


def token_spans(
    encoder: ChatEncoder, bridged: Bridged, response: str, places: Sequence[int], scores: Sequence[float]
) -> list[Span]:
    """One span a token with characters of the response; the scores of others (the end of the turn, parts of a
    character) go to the span before them, so that the sum stays what it was. [] for an empty response."""
    offsets = token_offsets(bridged)
    start, shown = response_start(encoder, bridged)
    content = answer(bridged)  # it ends with the response; the template may have trimmed it
    base = start - content.find(shown) + len(content) - len(response)
    spans: list[Span] = []
    before = 0.0  # scores that came before any span
    for place, score in zip(places, scores, strict=True):
        low, high = (min(max(edge - base, 0), len(response)) for edge in offsets[place + bridged.dropped])
        low = max(low, spans[-1].end) if spans else low
        if low < high:
            spans.append(Span(low, high, score + before))
            before = 0.0
        elif spans:
            spans[-1].score += score
        else:
            before += score
    return spans
