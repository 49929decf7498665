"""Roles: what becomes of system messages, repeated roles, tools and roles nobody knows."""

import json
import re
from datetime import datetime
from typing import Any

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.probe import A1, A2, S1, U1, U2, Probe, assistant, system, user

LATER = datetime(2031, 8, 23, 4, 5, 6)
TOOL = {
    "type": "function",
    "function": {
        "name": "tqone_lookup",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"argqone": {"type": "string", "description": "What."}},
        },
    },
}


def t010(probe: Probe) -> Found | None:
    if probe.error([user()], True) is not None:
        return None
    error = probe.error([system(), user()], True)
    return Found(f"it raises {error!r}", {"error": error}) if error is not None else None


def t011(probe: Probe) -> Found | None:
    text = probe.text([system(), user()], True)
    if text is None or S1 in text or S1 in (probe.text([system(), user(), assistant()]) or ""):
        return None
    return Found("the system text is not in the render", {"render": text})


def t012(probe: Probe) -> Found | None:
    words = probe.preamble.split()
    if len(words) < 3:
        return None
    shown = " ".join(words)
    return Found(f"it begins with {shown[:80]!r}", {"preamble": probe.preamble})


def t013(probe: Probe) -> Found | None:
    later = probe.text([user(), assistant()], clock=LATER)
    return None if later == probe.basic else Found("another date gives another text", {"render": probe.basic})


def t014(probe: Probe) -> Found | None:
    if probe.error([user()]) is not None:
        return None
    for messages, what in (
        ([user(), user(U2)], "two user turns"),
        ([user(), assistant(), assistant(A2)], "two answers"),
    ):
        error = probe.error(messages)
        if error is not None:
            return Found(f"{what} in a row raise {error!r}", {"error": error})
    return None


def t015(probe: Probe) -> Found | None:
    text = probe.text([system(), user(), assistant(), user(U2)])
    if text is None or S1 not in text or U1 not in text or t019(probe) is not None:
        return None
    header = probe.user_header.strip()
    place = text.index(S1)
    if place > text.index(U1):
        answered = probe.text([system(), user(), assistant()])
        gone = " and is gone once it is answered" if answered is not None and S1 not in answered else ""
        return Found(f"the system text stands in the last user turn{gone}", {"render": text})
    if header and header in text[:place]:
        return Found("the system text stands in the first user turn", {"render": text})
    return None


def t016(probe: Probe) -> Found | None:
    call = {
        "type": "function",
        "id": "callqone1",
        "function": {"name": "tqone_lookup", "arguments": {"argqone": "vqone"}},
    }
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "tqone_lookup", "tool_call_id": "callqone1", "content": "resqone"}
    answers = [probe.ask([user(), asked, result], tools=[TOOL])]
    if not isinstance(answers[0], str):  # some templates want the arguments as a JSON string
        function = {"name": "tqone_lookup", "arguments": json.dumps({"argqone": "vqone"})}
        spelled = {"role": "assistant", "content": None, "tool_calls": [{**call, "function": function}]}
        answers.append(probe.ask([user(), spelled, result], tools=[TOOL]))
    text = answers[-1]
    if not isinstance(text, str):
        return Found(f"a tool call raises {text.message!r}", {"error": text.message})
    lost = [name for name in ("tqone_lookup", "argqone", "vqone", "resqone") if name not in text]
    return Found(f"lost of a tool call and its result: {', '.join(lost)}", {"lost": lost}) if lost else None


def t018(probe: Probe) -> Found | None:
    message: dict[str, Any] = {"role": "critic", "content": S1}
    text = probe.text([user(), message, assistant()])
    if text is None or S1 in text or U1 not in text:
        return None
    return Found("a message of the role 'critic' is not in the render", {"render": text})


def t019(probe: Probe) -> Found | None:
    """With the roles swapped and everything else in place, a template that reads roles renders something else."""
    told = probe.text([user(), assistant(), user(U2)])
    swapped = probe.text([assistant(U1), user(A1), assistant(U2)])
    if told is None or told != swapped or not all(word in told for word in (U1, A1, U2)):
        return None
    first = told[told.index(U1) + len(U1) : told.index(A1)]
    second = told[told.index(A1) + len(A1) : told.index(U2)]
    if first == second:  # no headers at all: nothing is swapped
        return None
    return Found("swapping user and assistant changes nothing in the render", {"render": told})


def t039(probe: Probe) -> Found | None:
    text = probe.text([user(), assistant()], tools=[])
    return None if text == probe.basic else Found("an empty tool list adds text", {"render": text})


def default_system(probe: Probe) -> str:
    """The injected system prompt without markers, for comparison across templates; "" where there is none."""
    if t012(probe) is None:
        return ""
    words = re.sub(r"<[^<>]{1,40}>|\[/?[A-Z_]+\]", " ", probe.preamble).split()
    return " ".join(words[1:] if words[:1] == ["system"] else words)


CHECKS = {
    "T010": t010, "T011": t011, "T012": t012, "T013": t013, "T014": t014, "T015": t015, "T016": t016, "T018": t018,
    "T019": t019, "T039": t039,
}  # fmt: skip
