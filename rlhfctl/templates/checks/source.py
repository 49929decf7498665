"""The template itself: is there one, does it compile and render, and does everybody render it alike."""

from pathlib import Path

import jinja2

from rlhfctl.templates.catalogue import Found
from rlhfctl.templates.probe import A1, U1, Probe, assistant, user


def t001(probe: Probe) -> Found | None:
    if probe.side.template is not None:
        return None
    return Found(f"{probe.side.name} {probe.side.problem}", {"templates": sorted(probe.side.templates)})


def t002(probe: Probe) -> Found | None:
    answer = probe.ask([user(), assistant()])
    if not isinstance(answer, jinja2.TemplateSyntaxError) and "does not compile" not in str(answer):
        return None
    line = answer.lineno if isinstance(answer, jinja2.TemplateSyntaxError) else None
    where = f"line {line}: " if line else ""
    return Found(f"{where}{str(answer).splitlines()[0]}", {"line": line})


def t003(probe: Probe) -> Found | None:
    error = probe.error([user(), assistant()])
    if error is None or probe.side.template is None or t002(probe) is not None:
        return None
    return Found(f"it raises {error!r}", {"error": error})


def t004(probe: Probe) -> Found | None:
    sources = probe.side.sources
    if len(set(sources.values())) < 2 or probe.side.source not in sources:  # or another template was named
        return None
    renders = {
        label: probe.text([user(), assistant(), user()], True, source=text) for label, text in sources.items()
    }
    differ = len(set(renders.values())) > 1
    labels = " and ".join(sources)
    how = "render the same chat differently" if differ else "differ, but render the same plain chat alike"
    return Found(
        f"{labels} {how}; transformers uses {probe.side.source}",
        {"sources": sorted(sources), "renders_differ": differ},
        "error" if differ else "warning",
    )


def t006(probe: Probe) -> Found | None:
    if probe.basic is None or probe.side.template is None:
        return None
    messages = [user(), assistant()]
    plain = probe.text(messages, plain=True)
    if plain == probe.basic:
        return None
    how = "raises an error" if plain is None else "gives another text"
    return Found(f"a default jinja2.Environment {how}", {"plain": plain})


def t007(probe: Probe) -> Found | None:
    if probe.basic is None:
        return None
    lost = [word for word in (U1, A1) if word not in probe.basic]
    if not lost:
        return None
    return Found(f"the content {lost[0]!r} is not in the render", {"lost": lost, "render": probe.basic})


def t008(probe: Probe) -> Found | None:
    text = probe.basic
    if not text:
        return None
    if text[0].isspace():
        return Found(f"it begins with {text[: len(text) - len(text.lstrip())]!r}", {"start": text[:40]})
    if probe.bos and probe.bos != probe.side.tokens.get("eos_token") and text.find(probe.bos) > 0:
        return Found(
            f"{probe.bos} stands at character {text.find(probe.bos)}", {"position": text.find(probe.bos)}
        )
    return None


def t009(probe: Probe) -> Found | None:
    path = Path(probe.side.source) if probe.side.source.endswith(".jinja") else None
    if path is not None and not path.is_file() and probe.side.path is not None:
        path = probe.side.path / probe.side.source
    if path is None or not path.is_file():
        return None
    raw = path.read_bytes()
    seen = [
        name for name, there in (("CRLF", b"\r\n" in raw), ("a final newline", raw.endswith(b"\n"))) if there
    ]
    return Found(f"{path.name} has {' and '.join(seen)}", {"seen": seen}) if seen else None


CHECKS = {
    "T001": t001, "T002": t002, "T003": t003, "T004": t004, "T006": t006, "T007": t007, "T008": t008, "T009": t009,
}  # fmt: skip
