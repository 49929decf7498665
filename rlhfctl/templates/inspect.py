"""The gate: one or two sides in, every finding out. Pure but for the child process that renders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from rlhfctl.preflight.finding import Finding
from rlhfctl.templates.adapt import fold_system, merge_roles
from rlhfctl.templates.bounded import Sandbox
from rlhfctl.templates.catalogue import Found, finding
from rlhfctl.templates.checks import data, history, lost, pair, roles, seam, source, tokens
from rlhfctl.templates.checks.pair import Pair, bridge_mode
from rlhfctl.templates.facts import render_markers, side_facts, token_counts
from rlhfctl.templates.lock import CONVERSATIONS, t005
from rlhfctl.templates.probe import S1, U1, U2, Probe, assistant, system, user
from rlhfctl.templates.render import Message
from rlhfctl.templates.sides import Side
from rlhfctl.templates.traits import LOWERED, POLICY_ONLY, RAISED, Traits, traits

SIDE_CHECKS = {
    **source.CHECKS, "T005": t005, **roles.CHECKS, **seam.CHECKS, **history.CHECKS, **tokens.CHECKS,
}  # fmt: skip
WITHOUT_RENDER = (
    "T001",
    "T002",
    "T003",
    "T004",
    "T009",
    "K004",
    "K005",
    "K006",
    "K009",
    "K011",
    "K013",
    "K014",
)
BRIDGED = {
    "P001",
    "P003",
    "P004",
    "P005",
    "P011",
    "P014",
    "P015",
    "P018",
    "K007",
    "K008",
    "K013",
    "K017",
    "T007",
    "T023",
}
FOLDED = {"P007", "P008", "T010", "T011", "T019"}
MERGED = {"P009", "T014"}
ALWAYS_SAFE = {"K013", "P018"}  # rlhfctl adds no special tokens, and rows carry their own labels
SIDES = ("policy", "rm", "pair")
SEVERITIES = ("error", "warning", "info")


@dataclass(slots=True)
class Options:
    """conversations: (origin, messages) of the data, each of which is rendered. traits: what all of the data holds;
    default: what these hold. complete: nothing else is in the data, so that what it does not hold need not be feared.
    rows: those in which parts are looked for that a template loses; default: `lost.shapes` of the conversations.
    policy_reads: whole conversations, or prompts (then the last message of each row stands for the answer), or, of a
    policy that is trained as a reward model, what the bridge makes of conversations. bridge, fold_system, merge_roles:
    what the run will do about findings. allow: ids that may pass."""

    clock: datetime | None = None
    bridge: bool = False
    fold_system: bool = False
    merge_roles: bool = False
    strict: bool = False
    allow: frozenset[str] = frozenset()
    conversations: Sequence[tuple[str, Sequence[Message]]] = ()
    traits: Traits | None = None
    rows: Sequence[lost.Row] | None = None
    policy_reads: Literal["conversations", "prompts", "bridged"] = "conversations"
    complete: bool = True
    messages: Sequence[Message] | None = None


@dataclass
class Report:
    findings: list[Finding]
    policy: dict[str, Any]
    reward_model: dict[str, Any] | None
    bridge: dict[str, Any] | None
    renders: dict[str, str | None]
    messages: Sequence[Message]
    options: Options = field(repr=False)
    markers: tuple[Sequence[str], Sequence[str]] = ((), ())  # special tokens that the sides' renders hold
    token_counts: dict[str, dict[str, int]] = field(default_factory=dict)  # render -> vocabulary -> tokens

    @property
    def exit_code(self) -> int:
        fatal = {"error", "warning"} if self.options.strict else {"error"}
        open_ = [
            f
            for f in self.findings
            if f.severity in fatal and not f.handled and f.id not in self.options.allow
        ]
        return 3 if open_ else 0

    def as_dict(self) -> dict[str, Any]:
        summary = {
            name: sum(f.severity == name and not f.handled for f in self.findings) for name in SEVERITIES
        }
        summary["handled"] = sum(f.handled for f in self.findings)
        return {
            "schema": 1,
            "status": "mismatch" if self.exit_code else "ok",
            "exit_code": self.exit_code,
            "policy": self.policy,
            "reward_model": self.reward_model,
            "findings": [
                {key: value for key, value in found.as_dict().items() if key != "exit_code"}
                for found in self.findings
            ],
            "bridge": self.bridge,
            "renders": self.renders,
            "summary": summary,
        }


def inspect(policy: Side, rm: Side | None = None, options: Options | None = None) -> Report:
    """Every finding on the policy, the reward model and the pair, in the order side, severity, id."""
    options = options or Options()
    clock = options.clock or datetime.now()
    seen = options.traits if options.traits is not None else traits(options.conversations)
    messages = options.messages if options.messages is not None else CONVERSATIONS["chat"][0]
    with _sandbox() as sandbox:
        left = _probe(policy, sandbox, clock)
        findings = single_side_findings(left, "policy")
        renders: dict[str, str | None] = {"policy": left.text(messages), "rm": None}
        findings += _data_findings(left, None, options)
        _add_lost(findings, _lost(left, options.policy_reads, options), "policy")
        facts, bridge = None, None
        if rm is not None:
            right = _probe(rm, sandbox, clock)
            findings += single_side_findings(right, "rm")
            both = Pair(left, right, tuple(messages for _, messages in options.conversations))
            of_pair = pair_findings(both)
            findings += of_pair
            findings += _data_findings(right, both, options)
            _add_lost(findings, _lost(right, "bridged", options), "rm")
            bridge = bridge_mode(both, {f.id for f in of_pair}, options.merge_roles)
            renders["rm"] = right.text(messages)
            facts = side_facts(right)
        report = Report(findings, side_facts(left), facts, bridge, renders, messages, options)
        report.markers = (render_markers(policy), render_markers(rm) if rm is not None else ())
        report.token_counts = token_counts(policy, rm, renders)
    for found in report.findings:
        _weigh(found, seen, options)
        found.handled = _handled(found, bridge, options)
    report.findings.sort(key=lambda f: (SIDES.index(f.side), SEVERITIES.index(f.severity), f.id))
    return report


@contextmanager
def _sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    try:
        yield sandbox
    finally:
        sandbox.close()


def _probe(side: Side, sandbox: Sandbox, clock: datetime) -> Probe:
    probe = Probe(side, sandbox, clock)
    if source.t007(probe) is not None and probe.list_chat is not None:
        return Probe(side, sandbox, clock, wrap=True)
    return probe


def single_side_findings(probe: Probe, side: str) -> list[Finding]:
    """side: policy | rm. A template that does not render gets no findings that need a render."""
    results = []
    renders = probe.basic is not None and probe.usable
    for id, check in SIDE_CHECKS.items():
        if not renders and id not in WITHOUT_RENDER and id != "T007":
            continue
        with suppress(tokens.CannotEncode):
            found = check(probe)
            if found is not None:
                results.append(finding(id, side, found))
    if probe.wrap:
        detail = "it wants content as a list of parts and loses strings"
        results.append(finding("T007", side, Found(detail, {"list_content": True})))
    return results


def pair_findings(both: Pair) -> list[Finding]:
    dead = pair.p013(both)
    if dead is not None:
        return [finding("P013", "pair", dead)]
    results = []
    for id, check in pair.CHECKS.items():
        with suppress(tokens.CannotEncode):
            found = check(both)
            if found is not None:
                results.append(finding(id, "pair", found))
    return results


def _data_findings(probe: Probe, both: Pair | None, options: Options) -> list[Finding]:
    """Findings that only data can show. both: given for the reward model's side."""
    side = "policy" if both is None else "rm"
    found = {"K017": data.k017(probe, options.conversations) if both is not None else None}
    if both is None:
        found["P018"] = data.p018(probe, options.conversations)
    results = [
        finding(id, "pair" if id.startswith("P") else side, hit)
        for id, hit in found.items()
        if hit is not None
    ]
    return results


def _lost(probe: Probe, reads: str, options: Options) -> dict[str, Found]:
    """What a side does not read of the data's rows, by finding id."""
    rows = options.rows if options.rows is not None else lost.shapes(options.conversations)
    if not rows or probe.basic is None or not probe.usable:
        return {}
    if reads != "bridged":
        return lost.lost_parts(probe, rows, prompt=reads == "prompts")
    found = lost.lost_parts(probe, [_bridged(probe, row, options) for row in rows])
    tools = lost.unread_tools(rows)
    return {"T016": tools, **found} if tools is not None else found


def _bridged(probe: Probe, row: lost.Row, options: Options) -> lost.Row:
    """The row as the bridge hands it on: it folds and merges where the template needs it, and passes no tools."""
    messages = row.messages
    if options.fold_system and S1 not in (probe.text([system(), user(), assistant()]) or ""):
        messages = fold_system(messages)
    if options.merge_roles and U1 not in (probe.text([user(), user(U2), assistant()]) or ""):
        messages = merge_roles(messages)
    return lost.Row(row.origin, messages)


def _add_lost(findings: list[Finding], parts: dict[str, Found], side: str) -> None:
    """A probe's finding that rows of the data confirm becomes the rows' own; one finding a side and id."""
    for id, found in parts.items():
        known = next((f for f in findings if (f.id, f.side) == (id, side)), None)
        if known is None:
            findings.append(finding(id, side, found))
            continue
        known.severity = "error"
        known.detail += f"; {found.detail}"
        known.evidence = {**known.evidence, **found.evidence}


def _weigh(found: Finding, seen: Traits, options: Options) -> None:
    """Severity by what the data holds."""
    if found.id in RAISED and not (found.side == "rm" and found.id in POLICY_ONLY):
        trait, severity = RAISED[found.id]
        if seen.has(trait) and SEVERITIES.index(severity) < SEVERITIES.index(found.severity):
            found.severity = severity
        if seen.has(trait):
            found.evidence = {**found.evidence, "data": seen.found[trait]}
            found.detail += f" (data: {seen.found[trait]})"
            return
    if found.id in LOWERED and seen.rows and options.complete and not seen.has(LOWERED[found.id][0]):
        found.severity = LOWERED[found.id][1]


def _handled(found: Finding, bridge: dict[str, Any] | None, options: Options) -> bool:
    if "lost" in found.evidence and "row" in found.evidence:  # what was done about it did not keep it
        return False
    if found.id in ALWAYS_SAFE and (bridge is None or options.bridge):
        return True
    if bridge is None or not options.bridge or bridge["mode"] == "impossible":
        return False
    if found.id in BRIDGED:
        return not (found.side == "policy" and found.id in ("T007", "K017"))
    if found.side == "policy":
        return False
    return (found.id in FOLDED and options.fold_system) or (found.id in MERGED and options.merge_roles)
