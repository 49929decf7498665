"""One result of one check, as it stands in preflight.json and in the report."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]


@dataclass(slots=True)
class Finding:
    """exit_code: what an error of this kind ends the command with (2, 3, 4 or 5 of cli/exit_codes.py)."""

    id: str
    severity: Severity
    title: str
    detail: str = ""
    fix: str = ""
    side: str = "run"  # policy | rm | pair | data | reward | machine | run
    evidence: dict[str, Any] = field(default_factory=dict)
    handled: bool = False
    exit_code: int = 5

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
