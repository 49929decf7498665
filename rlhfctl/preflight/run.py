"""All checks of one recipe before launch: every finding in one report, and never a crash."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfctl.errors import RlhfctlError, UsageError, closed_path
from rlhfctl.preflight import (
    data,
    engine,
    judgements,
    loss_mask,
    machine,
    memory,
    model,
    offline,
    quantized,
    reward,
    shapes,
    template,
    vocabulary,
)
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, NotThere
from rlhfctl.streams import write

if TYPE_CHECKING:
    from rlhfctl.recipe.load import Loaded

CHECKS: dict[str, Callable[[Inputs], Iterable[Finding]]] = {
    "model": model.check,
    "quantization": quantized.check,
    "data": data.check_files,
    "template": template.check,
    "rows": data.check_rows,
    "template gate": template.check_gate,  # weighs its findings by the rows, so it comes after them
    "loss mask": loss_mask.check,
    "judgements": judgements.check,
    "offline data": offline.check,
    "vocabulary": vocabulary.check,
    "shapes": shapes.check,
    "reward": reward.check,
    "machine": machine.check,
    "rollout engine": engine.check,
    "memory": memory.check,
}
SEVERITIES = ("error", "warning", "info")
# What a command ends with when several checks fail: the recipe's own faults before the machine's.
PRECEDENCE = (2, 3, 5, 4, 1)
STATUS = {0: "ok", 1: "failed", 2: "invalid", 3: "mismatch", 4: "unable", 5: "refused"}


@dataclass(frozen=True, slots=True)
class Report:
    """findings: errors first. renders: one row through the templates of the policy and of each reward model."""

    findings: list[Finding]
    renders: list[dict[str, str | None]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        codes = {f.exit_code for f in self.findings if f.severity == "error" and not f.handled}
        return next((code for code in PRECEDENCE if code in codes), 1 if codes else 0)

    @property
    def status(self) -> str:
        return STATUS[self.exit_code]

    def as_dict(self) -> dict[str, Any]:
        summary = dict.fromkeys((*SEVERITIES, "handled"), 0)
        for finding in self.findings:
            summary["handled" if finding.handled else finding.severity] += 1
        return {
            "schema": 1,
            "status": self.status,
            "exit_code": self.exit_code,
            "findings": [finding.as_dict() for finding in self.findings],
            "summary": summary,
            "renders": self.renders,
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(severity, id, what is wrong, what to do) of each finding, for a table."""
        return [
            (
                "handled" if finding.handled else finding.severity,
                finding.id,
                finding.title + (f": {finding.detail}" if finding.detail else ""),
                finding.fix,
            )
            for finding in self.findings
        ]


def run_preflight(loaded: "Loaded", *, run_dir: Path | None = None, quick: bool = False) -> Report:
    """run_dir: where checkpoints would go. quick: fewer rows, and the reward is not called."""
    recipe = loaded.recipe
    inputs = Inputs(recipe, run_dir, quick)
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        findings += run_check(name, check, inputs)
    for finding in findings:
        if finding.id in recipe.template.allow:
            finding.handled = True
    findings.sort(key=lambda finding: (finding.handled, SEVERITIES.index(finding.severity), finding.id))
    return Report(findings, inputs.renders)


def run_check(name: str, check: Callable[[Inputs], Iterable[Finding]], inputs: Inputs) -> list[Finding]:
    """One check's findings; what it cannot read and what breaks inside it are findings too."""
    findings: list[Finding] = []
    try:
        for finding in check(inputs):  # what it found before it broke stays
            findings.append(finding)
    except NotThere as reason:
        findings.append(Finding("C001", "info", f"{name}: not (wholly) checked", str(reason)))
    except RlhfctlError as error:
        findings.append(unreadable(name, error.message, error.exit_code))
    except Exception as error:  # a bug in a check must not hide the other checks' findings
        if (sentence := closed_path(error)) is not None:
            return [*findings, unreadable(name, sentence, UsageError.exit_code)]
        place = traceback.extract_tb(error.__traceback__)[-1]
        if os.environ.get("RLHFCTL_DEBUG", "") not in ("", "0"):
            write(sys.stderr, traceback.format_exc())
        findings.append(
            Finding(
                "C003",
                "error",
                f"{name}: the check itself failed",
                f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})",
                "report this; RLHFCTL_DEBUG=1 shows the traceback",
                exit_code=1,
            )
        )
    return findings


def unreadable(name: str, cause: str, exit_code: int) -> Finding:
    return Finding("C002", "error", f"{name}: what it needs cannot be read", cause, exit_code=exit_code)
