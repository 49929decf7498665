"""The gate's report for a terminal: plain lines, whitespace made visible."""

import re
from collections.abc import Sequence
from itertools import zip_longest

from rlhfctl.templates.inspect import Report

NEAR = 28  # characters shown on either side of the first difference
WIDTH = 58  # of one column of --render
SPACE = "\u00b7"
VISIBLE = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": SPACE}


def lines(report: Report, renders: bool = False) -> list[str]:
    """One line per finding, then the first difference, the bridge and the sum."""
    sides = [report.policy, *([report.reward_model] if report.reward_model else [])]
    result = [_heading(report), *(f"{side['name']}: {side['note']}" for side in sides if "note" in side)]
    found = report.findings
    wide = [max((len(text) for text in column), default=0) for column in (
        ["handled" if f.handled else f.severity for f in found], [f.id for f in found], [f.side for f in found],
    )]  # fmt: skip
    for each in found:
        what = each.title + (f": {each.detail}" if each.detail else "")
        state = "handled" if each.handled else each.severity
        result.append(
            f"{state:{wide[0]}}  {each.id:{wide[1]}}  {each.side:{wide[2]}}  {_one_line(what)}; fix: {each.fix}"
        )
    result += _difference(report)
    if report.bridge is not None:
        lossy = "; ".join(report.bridge["lossy"])
        result.append(f"bridge: {report.bridge['mode']}" + (f" ({lossy})" if lossy else ""))
    if renders:
        result += _renders(report)
    summary = report.as_dict()["summary"]
    result.append(
        ", ".join(
            f"{count} {name}{'s' * (count != 1 and name in ('error', 'warning'))}"
            for name, count in summary.items()
        )
    )
    return result


def _heading(report: Report) -> str:
    names = [report.policy["name"], *([report.reward_model["name"]] if report.reward_model else [])]
    return " against ".join(names)


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))


def visible(text: str) -> str:
    return "".join(VISIBLE.get(char, char) for char in text)


def _difference(report: Report) -> list[str]:
    left, right = report.renders["policy"], report.renders["rm"]
    if left is None or right is None or left == right:
        return []
    place = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    start = max(0, place - NEAR)
    before = visible(left[start:place])
    shown = [
        ("..." if start else "") + before + visible(text[place : place + NEAR]) for text in (left, right)
    ]
    marker = " " * (len("  policy  ") + (3 if start else 0) + len(before)) + "^"
    return [
        f"first difference, at character {place}:",
        f"  policy  {shown[0]}",
        f"  rm      {shown[1]}",
        marker,
    ]


def _renders(report: Report) -> list[str]:
    """Both renders side by side, special tokens in guillemets, newlines kept and shown."""
    left, right = report.renders["policy"], report.renders["rm"]
    columns = [_column(left, report.markers[0])]
    if report.reward_model is not None:
        columns.append(_column(right, report.markers[1]))
    rows = [
        " | ".join(f"{cell:{WIDTH}}" for cell in row).rstrip() for row in zip_longest(*columns, fillvalue="")
    ]
    names = ["policy", "reward model"][: len(columns)]
    result = [
        " | ".join(f"{name:{WIDTH}}" for name in names).rstrip(),
        "-+-".join("-" * WIDTH for _ in columns),
        *rows,
    ]
    for name, counts in report.token_counts.items():
        told = ", ".join(f"{count} in the {vocabulary}'s vocabulary" for vocabulary, count in counts.items())
        result += [f"tokens of the {name}'s render: {told}"] if told else []
    return result


def _column(text: str | None, markers: Sequence[str]) -> list[str]:
    if text is None:
        return ["(does not render)"]
    known = [re.escape(marker) for marker in sorted(markers, key=len, reverse=True) if marker]
    if known:
        text = re.sub("|".join(known), lambda found: f"\u00ab{found.group()}\u00bb", text)
    result = []
    for line in text.split("\n"):
        shown = line.replace("\t", "\\t").replace("\r", "\\r")
        shown = re.sub(r"^ +| +$", lambda found: SPACE * len(found.group()), shown)
        result += [shown[i : i + WIDTH] for i in range(0, len(shown), WIDTH)] or [""]
    return result
