"""Where an assistant turn begins and ends inside a rendered conversation, in characters.

No template says so itself (the `generation` tag is rare), and the lengths of incremental renders are wrong for
templates that rewrite earlier turns. So each turn is found from both sides: it begins where the prompt that the policy
would be given ends, and its content ends where the text after a substituted content begins.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from rlhfctl.templates.render import Message, Span

Render = Callable[[Sequence[Message], bool], str]  # (messages, add_generation_prompt) -> text

USER, ANSWER, NEXT, AGAIN = "UQONE alpha", "AQONE bravo", "UQTWO charlie", "AQTWO delta"
MARK = "QXTURNMARKXQ"
MARKER_LIKE = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Za-z_|]{2,40}\]")


@dataclass(frozen=True, slots=True)
class TurnEnds:
    """tokens: marker strings that end an assistant turn. stops: those of them that generation may stop at. text: what
    ends a turn where the template has no marker token for it ("" if nothing does)."""

    tokens: tuple[str, ...]
    stops: tuple[str, ...]
    text: str


def leading_marker(text: str, markers: Sequence[str]) -> str | None:
    """The marker that `text` starts with, whitespace aside; the longest one where several do."""
    text = text.lstrip()
    found = [marker for marker in markers if marker and text.startswith(marker)]
    return max(found, key=len, default=None)


def common_prefix(left: str, right: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # slices compare in C: a binary search beats a loop over characters
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(left: str, right: str) -> int:
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[len(left) - middle :] == right[len(right) - middle :]:
            low = middle
        else:
            high = middle - 1
    return low


def inside_marker(text: str, place: int) -> Span | None:
    """The marker of `text` that a place lies inside of (not at either end of)."""
    for found in MARKER_LIKE.finditer(text):
        if found.start() < place < found.end():
            return found.span()
    return None


def header_start(before: str, between: str, ends: Sequence[str] = ()) -> int:
    """Where, in the text from an answer to the next question, the user header begins that `before` ends in as well.

    ends: strings that are known to end a turn. They decide where a system prompt before the first question ends just as
    an answer does, so that everything is common; or else the first of two markers does."""
    place = len(between) - common_suffix(before, between)
    if place == 0:
        ending = next((end for end in ends if between.lstrip().startswith(end)), None)
        first = MARKER_LIKE.match(between.lstrip())
        if ending is None and first and MARKER_LIKE.search(between.lstrip(), first.end()):
            ending = first.group()
        return between.index(ending) + len(ending) if ending else 0
    marker = inside_marker(between, place)
    return marker[1] if marker else place


def turn_ends(render: Render, markers: Sequence[str], eos: str | None = None) -> TurnEnds:
    """How this template ends an assistant turn, from a probe conversation.

    markers: the strings of the vocabulary's added tokens. A template that cannot render the probe has no ends.
    """
    last = (eos,) if eos else ()
    user = {"role": "user", "content": USER}
    answer = {"role": "assistant", "content": ANSWER}
    follow = {"role": "user", "content": NEXT}
    again = {"role": "assistant", "content": AGAIN}
    try:
        text = render([user, answer, follow, again], False)
    except TemplateError:
        return TurnEnds(last, last, "")
    if ANSWER not in text or NEXT not in text or AGAIN not in text:
        return TurnEnds(last, last, "")
    between = text[text.index(ANSWER) + len(ANSWER) : text.index(NEXT)]
    final = text[text.index(AGAIN) + len(AGAIN) :]
    middle_token, final_token = leading_marker(between, markers), leading_marker(final, markers)
    tokens = tuple(dict.fromkeys(token for token in (final_token, middle_token, *last) if token))
    stops = tuple(token for token in tokens if token in (final_token, eos) or not _inside_turn(render, token))
    before_user = text[: text.index(USER)]
    return TurnEnds(tokens, stops, between[: header_start(before_user, between, [*tokens])].strip())


def _inside_turn(render: Render, token: str) -> bool:
    """Whether the marker also separates reasoning from answer within one turn: then it is no place to stop."""
    user = {"role": "user", "content": USER}
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": ANSWER,
        "thinking": NEXT,
        "reasoning_content": NEXT,
    }
    try:
        text = render([user, answer], False)
    except TemplateError:
        return False
    start, end = text.find(NEXT), text.find(ANSWER)
    return -1 < start < end and token in text[start:end]


def assistant_spans(
    render: Render, messages: Sequence[Message], ends: TurnEnds, markers: Sequence[str], chosen: Sequence[int]
) -> tuple[str, list[Span]]:
    """The rendered conversation and, for each index in `chosen` (assistant messages), the characters that the policy
    has to produce: from the end of its prompt up to and including the token that ends the turn."""
    text = render(messages, False)
    spans: list[Span] = []
    floor = 0  # a turn begins after the one before it
    for index in chosen:
        start, content_end = _content_span(render, messages, text, index, floor)
        has_calls = bool(messages[index].get("tool_calls"))
        end = _turn_end(text, content_end, ends, markers, anywhere=has_calls)
        if end > start:
            spans.append((start, end))
            floor = end
    return text, spans


def _content_span(render: Render, messages: Sequence[Message], text: str, index: int, floor: int) -> Span:
    """Where the turn begins, and where its content ends, in `text`."""
    start = _prompt_end(render, messages, text, index)
    content = messages[index].get("content")
    if start is not None and start >= floor and isinstance(content, str) and content:
        for form in (content, content.strip()):
            gap = len(text) - start - len(text[start:].lstrip()) if not form[:1].isspace() else 0
            if form and text.startswith(form, start + gap):
                return start, start + gap + len(form)
    marked, place, tail = _marked(render, messages, index)
    after = common_suffix(text, marked)
    if tail is not None:
        after = min(after, tail)
    content_end = max(len(text) - after, floor)
    if start is None or start < floor or start > content_end:
        start = _start_by_cue(render, messages, text, marked, place, index, floor)
    return min(start, content_end), content_end


def _prompt_end(render: Render, messages: Sequence[Message], text: str, index: int) -> int | None:
    """End of the prompt of turn `index` if the conversation continues it, up to a difference inside the generation
    prompt itself (a template that opens a reasoning block there and strips reasoning afterwards)."""
    if index == 0:
        return None
    try:
        prompt = render(messages[:index], True)
    except TemplateError:
        return None
    shared = common_prefix(prompt, text)
    if shared == len(prompt):
        return shared
    marker = inside_marker(prompt, shared)  # two markers that begin alike
    shared = marker[0] if marker else shared
    cue = common_prefix(prompt, render(messages[:index], False))
    return shared if prompt[cue:shared].strip() else None


def _marked(render: Render, messages: Sequence[Message], index: int) -> tuple[str, int, int | None]:
    """The render with the content of turn `index` replaced by a mark: text, where the mark is, and how much follows it.
    A template that loses the mark gives (text, -1, None)."""
    replaced = {**messages[index], "content": MARK}
    changed = [*messages[:index], replaced, *messages[index + 1 :]]
    try:
        marked = render(changed, False)
    except TemplateError:
        return "", -1, None
    place = marked.find(MARK)
    if place < 0:
        return marked, -1, None
    return marked, place, len(marked) - place - len(MARK)


def _start_by_cue(
    render: Render, messages: Sequence[Message], text: str, marked: str, place: int, index: int, floor: int
) -> int:
    """Where the turn begins when its prompt is no prefix of the conversation: after the last place, before the content,
    that looks like the generation prompt."""
    limit = common_prefix(text, marked)
    if place >= 0:
        limit = min(limit, place)
    limit = max(limit, floor)
    before = messages[index - 1].get("content") if index else None
    if isinstance(before, str) and before.strip():  # a cue inside the question is none
        found = text.rfind(before.strip(), floor, limit)
        floor = found + len(before.strip()) if found >= 0 else floor
    try:
        with_cue = render(messages[:index], True)
        cue = with_cue[common_prefix(with_cue, render(messages[:index], False)) :].lstrip()
    except TemplateError:
        cue = ""
    for size in range(len(cue), max(2, len(cue) // 3), -1):
        found = text.rfind(cue[:size].rstrip(), floor, limit)
        if found >= 0 and inside_marker(cue, size) is None:
            return found + len(cue[:size].rstrip())
    return limit


def _turn_end(text: str, content_end: int, ends: TurnEnds, markers: Sequence[str], anywhere: bool) -> int:
    """Past the token that ends the turn. Other markers and whitespace before it belong to the turn; without an ending
    token, the template's ending text is taken, else the content's end. anywhere: tool calls may stand in between."""
    if anywhere and ends.tokens:
        places = [
            text.find(token, content_end) + len(token) for token in ends.tokens if token in text[content_end:]
        ]
        if places:
            return min(places)
    position = content_end
    for _ in range(4):  # e.g. <|END_RESPONSE|><|END_OF_TURN_TOKEN|>
        rest = text[position : position + 256]
        marker = leading_marker(rest, markers)
        if marker is None:
            break
        position += len(rest) - len(rest.lstrip()) + len(marker)
        if marker in ends.tokens:
            return position
    rest = text[content_end:]
    if ends.text and rest.lstrip().startswith(ends.text):
        end = content_end + len(rest) - len(rest.lstrip()) + len(ends.text)
        marker = leading_marker(text[end : end + 256], ends.tokens)
        return text.index(marker, end) + len(marker) if marker else end
    return content_end
