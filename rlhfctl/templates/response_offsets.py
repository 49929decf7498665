"""Which characters of a decoded response each of its token ids wrote.

Found by decoding, not by encoding the text again: a text has other tokens than those that were sampled. Holds for every
decoder (byte-level, byte fallback, a leading space that is stripped), because only its texts are compared.
"""

from collections.abc import Sequence

from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.render import Span


def response_offsets(encoder: ChatEncoder, ids: Sequence[int], text: str) -> list[Span]:
    """[start, end) in `text` for each of `ids`, without gaps or overlaps.

    text: encoder.decode_response(ids). A character in several tokens belongs to the one that completes it. Tokens that
    wrote nothing (the stop token, a token that decodes to nothing) have start = end.
    """
    ids = list(ids)
    offsets: list[Span] = []
    window = settled = reached = (
        0  # first id of context, ids whose characters are final, and how many characters
    )
    for count in range(1, len(ids) + 1):
        before, now = _decode(encoder, ids[window:settled]), _decode(encoder, ids[window:count])
        if now.startswith(before):
            new = now[len(before) :]
            end = reached + _agreeing(new, text, reached)
            whole = end - reached == len(new)
        else:  # the decoder rewrites what came before: compare from the start
            everything = _decode(encoder, ids[:count])
            end = max(reached, _agreeing(everything, text, 0))
            whole = end == len(everything)
        offsets.append((offsets[-1][1] if offsets else 0, end))
        if whole and end > reached:
            window, settled, reached = settled, count, end
    return offsets


def _decode(encoder: ChatEncoder, ids: list[int]) -> str:
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _agreeing(part: str, text: str, start: int) -> int:
    """Characters that `part` and `text` from `start` on have in common at their beginning."""
    if text.startswith(part, start):
        return len(part)
    count = 0
    for mine, theirs in zip(part, text[start:], strict=False):
        if mine != theirs:
            break
        count += 1
    return count
