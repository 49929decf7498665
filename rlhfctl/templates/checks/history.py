"""What stays of a turn: earlier turns, reasoning, whitespace, and how turns end."""

import re

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.checks.seam import t022
from rlhfctl.templates.probe import A1, A2, R1, REASONED, REASONING, U1, U2, Probe, assistant, user

PADDED_U, PADDED_A = "  UQPAD one  ", "  AQPAD two  "
LINES = "LQONE first\n\n\nLQTWO second\n  LQTHREE third"


def t030(probe: Probe) -> Found | None:
    turns = [user(), assistant(), user(U2), assistant(A2)]
    for count in range(1, 4):
        now, later = probe.text(turns[:count]), probe.text(turns[: count + 1])
        if now is not None and later is not None and not later.startswith(now):
            detail = f"the render of {count} message{'s' * (count > 1)} is no prefix of that of {count + 1}"
            return Found(detail, {"messages": count, "now": now, "later": later})
    return None


def _keeps_last(probe: Probe) -> bool | None:
    text = probe.text([user(), assistant(REASONED)])
    return None if text is None else R1 in text


def t031(probe: Probe) -> Found | None:
    text = probe.text([user(), assistant(REASONED), user(U2)])
    if not _keeps_last(probe) or text is None or R1 in text:
        return None
    return Found("the reasoning is gone once another question follows", {"render": text})


def t032(probe: Probe) -> Found | None:
    if _keeps_last(probe) is not False:
        return None
    text = probe.text([user(), assistant(REASONED)])
    return Found("the reasoning is not in the render", {"render": text})


def t033(probe: Probe) -> Found | None:
    for text, before, answer in ((probe.basic, U1, A1), (probe.chat, U2, A2)):
        if text is None or before not in text or answer not in text:
            continue
        inserted = text[text.index(before) + len(before) : text.index(answer)]
        if REASONING.search(inserted):
            return Found(f"before an answer without reasoning stands {inserted!r}", {"inserted": inserted})
    return None


def t034(probe: Probe) -> Found | None:
    text = probe.text([user(PADDED_U), assistant(PADDED_A), user(U2)])
    if text is None:
        return None
    trimmed = [
        role
        for role, word in (("user", PADDED_U), ("assistant", PADDED_A))
        if word not in text and word.strip() in text
    ]
    return (
        Found(f"leading or trailing spaces of {' and '.join(trimmed)} turns are dropped", {"roles": trimmed})
        if trimmed
        else None
    )


def t035(probe: Probe) -> Found | None:
    text = probe.text([user(), assistant(LINES)])
    if text is None or LINES in text or not all(word in text for word in ("LQONE", "LQTHREE")):
        return None
    got = text[text.index("LQONE") : text.index("LQTHREE") + len("LQTHREE third")]
    return Found(f"{LINES!r} becomes {got!r}", {"got": got})


def t036(probe: Probe) -> Found | None:
    if probe.after_final.strip():
        return None
    return Found(f"after the last answer stands {probe.after_final!r}", {"after_final": probe.after_final})


def t037(probe: Probe) -> Found | None:
    if probe.chat is None or t036(probe) is not None or t022(probe) is not None:
        return None
    middle = probe.terminator.strip()
    if probe.bos and probe.bos != probe.side.tokens.get("eos_token"):  # the next turn's, not this one's end
        middle = middle.removesuffix(probe.bos).strip()
    final = probe.after_final.strip()
    if middle == final:
        return None
    return Found(
        f"{final!r} after the last answer, {middle!r} after earlier ones", {"final": final, "earlier": middle}
    )


def t038(probe: Probe) -> Found | None:
    if probe.side.template is None or re.search(r"\{%-?\s*generation\s*-?%\}", probe.side.template):
        return None
    return Found("frameworks that build the loss mask from these markers get a mask of zeros", {})


CHECKS = {
    "T030": t030, "T031": t031, "T032": t032, "T033": t033, "T034": t034, "T035": t035, "T036": t036, "T037": t037,
    "T038": t038,
}  # fmt: skip
