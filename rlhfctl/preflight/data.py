"""The data files: do they load, what becomes of their rows (D...)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhfctl.errors import RlhfctlError
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Encoded, Inputs

if TYPE_CHECKING:
    from rlhfctl.data.load import SourceReport

MANY = 0.5  # share of rows left out from which it is a warning with its own words
SHOWN = 5


def check_files(inputs: Inputs) -> Iterator[Finding]:
    """Before the template check, which reads the rows too: this one says why they cannot be read."""
    for split in ("train", "eval"):
        if not getattr(inputs.recipe.data, split):
            continue
        try:
            loaded = inputs.samples(split)
        except RlhfctlError as error:
            yield Finding(
                "D001",
                "error",
                f"data.{split} cannot be used",
                error.message,
                f"correct data.{split} or the file",
                "data",
                exit_code=error.exit_code,
            )
            continue
        for report in loaded.reports:
            yield from source_findings(split, report)


def check_rows(inputs: Inputs) -> Iterator[Finding]:
    """What the template and the lengths leave of them."""
    for split in ("train", "eval"):
        if getattr(inputs.recipe.data, split) and inputs.has_samples(split):
            yield from encoded_findings(inputs, split)
    if inputs.has_samples("train") and inputs.has_samples("eval"):
        yield from overlap_findings(inputs)


def overlap_findings(inputs: Inputs) -> list[Finding]:
    """D016: prompts of data.eval that are trained on."""
    from rlhfctl.data.overlap import shared_prompts

    samples = inputs.samples("eval").samples
    count = shared_prompts(samples, inputs.samples("train").samples)
    if not count:
        return []
    return [
        Finding(
            "D016",
            "warning",
            f"data.eval: {count} of {len(samples)} prompts are in data.train too",
            "their answers may be memory: the evaluation says less of other prompts",
            "take them out of one of the two",
            "data",
            {"count": count},
        )
    ]


def source_findings(split: str, report: "SourceReport") -> list[Finding]:
    """D002 rows skipped, D003 repeated ids, D004 what was read."""
    findings = [
        Finding(
            "D004",
            "info",
            f"data.{split}: {report.used} of {report.rows} rows of {report.path} read as {report.format}",
            side="data",
            evidence={"path": report.path, "format": report.format, "rows": report.rows, "used": report.used},
        )
    ]
    if report.bad_rows:
        shown = "; ".join(f"row {number}: {reason}" for number, reason in report.bad_rows[:SHOWN])
        findings.append(
            Finding(
                "D002",
                "warning",
                f"data.{split}: {len(report.bad_rows)} malformed rows of {report.path} are skipped",
                shown,
                "correct them; data.max_bad_rows allows this many",
                "data",
                {"path": report.path, "rows": [number for number, _ in report.bad_rows]},
            )
        )
    if report.duplicate_ids:
        count = len(report.duplicate_ids)
        findings.append(
            Finding(
                "D003",
                "warning",
                f"data.{split}: {count} rows of {report.path} repeat an id or a whole row",
                f"first: {', '.join(report.duplicate_ids[:SHOWN])}",
                "remove the copies, or give rows with one id different ids",
                "data",
                {"path": report.path, "count": count},
            )
        )
    return findings


def encoded_findings(inputs: Inputs, split: str) -> list[Finding]:
    """D005 no row is left, D006 rows are left out."""
    encoded = inputs.encoded(split)
    report = encoded.report
    dropped = sum(report.dropped.values())
    total = report.kept + dropped
    of = f" (1 row in {encoded.every} looked at)" if encoded.every > 1 else ""
    evidence = {"kept": report.kept, "dropped": dict(report.dropped), "examples": report.examples}
    if not report.kept:
        return [
            Finding(
                "D005",
                "error",
                f"data.{split}: none of {total} rows is left",
                report.sentence() + of,
                length_fix(inputs, split, encoded),
                "data",
                evidence,
            )
        ]
    if not dropped:
        return []
    return [
        Finding(
            "D006",
            "warning" if dropped > MANY * total or set(report.dropped) != {"too long"} else "info",
            f"data.{split}: {dropped} of {total} rows are left out{of}",
            report.sentence(),
            length_fix(inputs, split, encoded),
            "data",
            evidence,
        )
    ]


def length_fix(inputs: Inputs, split: str, encoded: Encoded) -> str:
    if "too long" not in encoded.report.dropped:
        return "look at the rows named"
    return f"raise {'rollout.max_prompt_length' if inputs.answered(split) else 'data.max_length'}, or shorten rows"
