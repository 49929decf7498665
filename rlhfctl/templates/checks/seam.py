"""The generation prompt, and the seam between prompt and response."""

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.probe import A1, REASONING, Probe, assistant, user


def _no_effect(probe: Probe) -> bool:
    return probe.prompt is not None and probe.prompt == probe.text([user()])


def _is_prefix(probe: Probe) -> bool:
    return probe.prompt is not None and probe.basic is not None and probe.basic.startswith(probe.prompt)


def t017(probe: Probe) -> Found | None:
    text = probe.text([user(), assistant(A1 + " ")])
    if text is None or A1 + " " in text or A1 not in text:
        return None
    return Found("the last space of an answer is dropped", {"render": text})


def t020(probe: Probe) -> Found | None:
    if not _no_effect(probe) or not _is_prefix(probe):
        return None
    return Found("the prompt is the same with and without it", {"prompt": probe.prompt})


def t021(probe: Probe) -> Found | None:
    if not _no_effect(probe) or _is_prefix(probe):
        return None
    return Found(
        "the prompt is the same with and without it", {"prompt": probe.prompt, "render": probe.basic}
    )


def t022(probe: Probe) -> Found | None:
    cue = probe.cue
    if not cue.strip() or not probe.after_final.endswith(cue):
        return None
    if cue.strip() == probe.terminator.strip():  # one string ends every turn, whoever spoke
        return None
    return Found(f"after the last answer stands {probe.after_final!r}", {"after_final": probe.after_final})


def t023(probe: Probe) -> Found | None:
    found = REASONING.search(probe.cue)
    if found is None:
        return None
    return Found(f"a prompt ends in {probe.cue.strip()!r}", {"cue": probe.cue})


def t024(probe: Probe) -> Found | None:
    if probe.prompt is None or _is_prefix(probe):
        return None
    return Found("text[len(prompt):] is not the response", {"prompt": probe.prompt, "render": probe.basic})


def t025(probe: Probe) -> Found | None:
    if not _is_prefix(probe) or probe.basic is None or probe.prompt is None:
        return None
    rest = probe.basic[len(probe.prompt) :]
    if rest.startswith(A1):
        return None
    return Found(
        f"between prompt and answer stands {rest[: rest.find(A1)]!r}", {"inserted": rest[: rest.find(A1)]}
    )


def t026(probe: Probe) -> Found | None:
    on, off = (probe.text([user()], True, kwargs={"enable_thinking": value}) for value in (True, False))
    if "enable_thinking" in probe.side.template_kwargs or on == off or probe.prompt != off:
        return None
    return Found("unset renders as enable_thinking: false", {"unset": probe.prompt, "true": on})


CHECKS = {
    "T017": t017, "T020": t020, "T021": t021, "T022": t022, "T023": t023, "T024": t024, "T025": t025, "T026": t026,
}  # fmt: skip
