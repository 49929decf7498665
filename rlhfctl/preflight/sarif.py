"""Findings as SARIF 2.1.0, which code hosts show beside the changed lines of a recipe.

python -m rlhfctl.preflight.sarif RECIPE REPORT.json... > findings.sarif

A report is what `inspect-template --json` or `--dry-run --json` printed. Errors in the recipe itself carry their line.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rlhfctl import __version__

LEVELS = {"error": "error", "warning": "warning", "info": "note"}
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(recipe: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of one tool; a finding that two reports have counts once."""
    results: list[dict[str, Any]] = []
    for report in reports:
        results += [of_finding(recipe, each) for each in report.get("findings", [])]
        results += [of_recipe_error(recipe, each) for each in report.get("errors", [])]
    distinct = list({json.dumps(each, sort_keys=True): each for each in results}.values())
    rules = [{"id": name} for name in sorted({each["ruleId"] for each in distinct})]
    driver = {"name": "rlhfctl", "version": __version__, "rules": rules}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": distinct}],
    }


def of_finding(recipe: str, finding: dict[str, Any]) -> dict[str, Any]:
    said = ": ".join(part for part in (finding["title"], finding.get("detail")) if part)
    fix = f" Fix: {finding['fix']}" if finding.get("fix") else ""
    result = located(finding["id"], LEVELS[finding["severity"]], said + fix, recipe, 1)
    if finding.get("handled"):
        result["suppressions"] = [
            {"kind": "external", "justification": "handled by the recipe or the bridge"}
        ]
    return result


def of_recipe_error(recipe: str, error: dict[str, Any]) -> dict[str, Any]:
    return located("recipe", "error", error["message"], error.get("file") or recipe, error.get("line") or 1)


def located(rule: str, level: str, text: str, file: str, line: int) -> dict[str, Any]:
    place = {"artifactLocation": {"uri": file}, "region": {"startLine": line}}
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": text},
        "locations": [{"physicalLocation": place}],
    }


def main(argv: list[str]) -> int:
    if len(argv) < 2:
        print("usage: python -m rlhfctl.preflight.sarif RECIPE REPORT.json...", file=sys.stderr)
        return 2
    try:
        reports = [json.loads(Path(path).read_text(encoding="utf-8")) for path in argv[1:]]
        print(json.dumps(sarif(argv[0], reports), indent=1))
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        if isinstance(error, OSError):
            print(f"cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            print(
                f"{', '.join(argv[1:])}: not what --json or preflight.json holds ({type(error).__name__}: {error})",
                file=sys.stderr,
            )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
