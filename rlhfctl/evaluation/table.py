"""The result as a table of plain text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhfctl.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from rlhfctl.evaluation.run import Result

SHARES = ("accuracy", "path_accuracy", "truncated", "pass@", "majority@")


def render(result: "Result") -> str:
    facts = result.facts
    lines = [f"{facts['model']}: {facts['prompts']} prompts of {', '.join(facts['data'])}"]
    lines += _rows("metric", result.measures)
    if result.differences:
        lines += ["", *_rows("paired difference", result.differences)]
    if facts["failures"]:
        lines.append(f"{facts['failures']} answers could not be judged and are left out")
    return "\n".join(lines)


def _rows(title: str, estimates: Mapping[str, Estimate]) -> list[str]:
    header = (title, "value", "95 % interval", "n", "interval by")
    rows = [header, *((name, *_cells(name, estimate)) for name, estimate in estimates.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cells(name: str, estimate: Estimate) -> tuple[str, str, str, str]:
    percent = name.startswith(SHARES)

    def shown(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    between = f"{shown(estimate.low)} .. {shown(estimate.high)}"
    return shown(estimate.value), between, str(estimate.n), estimate.interval
