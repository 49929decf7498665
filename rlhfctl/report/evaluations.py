"""Evaluations in the report: every metric with its interval, and the search trees of a beam."""

from html import escape
from typing import Any

from rlhfctl.report.chart import number
from rlhfctl.report.read import Evaluation, Run

MOST_NODES = 200  # of one tree


def render(run: Run) -> str:
    return "".join(one(each) for each in run.evaluations)


def one(evaluation: Evaluation) -> str:
    summary = evaluation.summary
    data = summary.get("data")
    facts = [
        str(summary.get("method") or ""),
        ", ".join(map(str, data)) if isinstance(data, list) else str(data or ""),
    ]
    facts = [fact for fact in facts if fact]
    if isinstance(summary.get("prompts"), int):
        facts.append(f"{summary['prompts']} prompts")
    rows = [
        row(name, found)
        for part in ("metrics", "differences")
        for name, found in (summary.get(part) or {}).items()
        if isinstance(found, dict)
    ]
    head = "".join(f"<th>{cell}</th>" for cell in ("metric", "value", "95 % interval", "n"))
    trees = "".join(tree(each) for each in evaluation.trees)
    return (
        f"<p><b>{escape(evaluation.name)}</b> <span class='quiet'>{escape(' · '.join(facts))}</span></p>"
        f"<div class='scroll'><table><tr>{head}</tr>{''.join(rows)}</table></div>{trees}"
    )


def row(name: str, found: dict[str, Any]) -> str:
    low, high = found.get("low"), found.get("high")
    interval = f"{shown(low)} to {shown(high)}" if low is not None or high is not None else ""
    cells = (name, shown(found.get("value")), interval, found.get("n", ""))
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"


def shown(value: object) -> str:
    return number(float(value)) if isinstance(value, int | float) else "-"


def tree(record: dict[str, Any]) -> str:
    """All candidates of one prompt under the step that they continue; what was dropped is faint, the answer bold."""
    nodes = [node for node in record.get("nodes") or [] if isinstance(node, dict)][:MOST_NODES]
    children: dict[Any, list[int]] = {}
    for place, node in enumerate(nodes):
        children.setdefault(node.get("parent"), []).append(place)
    roots = [place for parent, places in children.items() if not _known(parent, nodes) for place in places]
    return (
        f"<details><summary>search tree of {escape(str(record.get('id')))}, {len(nodes)} candidates</summary>"
        f"{branches(roots, nodes, children, record.get('chosen'), 0)}</details>"
    )


def branches(
    places: list[int], nodes: list[dict[str, Any]], children: dict[Any, list[int]], chosen: object, depth: int
) -> str:
    parts = []
    for place in places:
        node = nodes[place]
        inner = children.get(place, []) if depth < 50 else []
        below = branches(inner, nodes, children, chosen, depth + 1) if inner else ""
        text = f"<pre>{escape(str(node.get('text', '')))}</pre>"
        said = f"V {shown(node.get('value'))}, score {shown(node.get('score'))}"
        if node.get("finish"):
            said += f", {node['finish']}"
        kept = "" if node.get("kept") or place == chosen else " class='out'"
        text = f"<b>{text}</b>" if place == chosen else text
        parts.append(f"<li{kept}>{text} <span class='quiet'>{escape(said)}</span>{below}</li>")
    return f"<ul class='tree'>{''.join(parts)}</ul>" if parts else ""


def _known(parent: object, nodes: list[dict[str, Any]]) -> bool:
    return isinstance(parent, int) and 0 <= parent < len(nodes)
