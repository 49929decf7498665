"""One self-contained HTML page of one or several runs: no script, no request, light and dark, narrow and wide."""

import json
from html import escape
from typing import Any

from rlhfctl.report import evaluations, samples
from rlhfctl.report.chart import COLOURS, chart
from rlhfctl.report.read import Run, differences
from rlhfctl.report.style import LINES, STYLE

# The first charts of the page, where a run has them; all others follow, folded, by group.
FIRST = (
    "reward/mean", "eval/accuracy", "eval/path_accuracy", "kl/reference", "kl/rollout", "length/response", "entropy",
    "clip/fraction", "loss/sft", "loss/rm", "eval/loss", "rm/accuracy", "rm/margin", "loss/policy",
    "loss/value", "value/explained_variance", "grad_norm", "tokens_per_second",
)  # fmt: skip
# What the verdict tells, and without any of it the first of these that a run has.
TOLD = ("eval/accuracy", "reward/mean", "eval/loss")
ELSE = ("rm/accuracy", "loss/sft", "loss/rm", "loss/policy")


def page(runs: list[Run]) -> str:
    title = ", ".join(dict.fromkeys(run.name for run in runs))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{escape(title)}</title><style>{STYLE}{LINES}</style></head><body><h1>{escape(title)}</h1>",
        overview(runs),
        curves(runs),
        section("What differs", recipe_differences(runs)) if len(runs) > 1 else "",
        *(of_one(run, several=len(runs) > 1) for run in runs),
        "</body></html>",
    ]
    # A name of other bytes than UTF-8 and half of a surrogate pair are no characters that a page can hold.
    return "".join(parts).encode("utf-8", "replace").decode()


def section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def table(header: list[str], rows: list[list[Any]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def overview(runs: list[Run]) -> str:
    """The verdict: a line for each run, with the colour of its curves."""
    lines = []
    for index, run in enumerate(runs):
        state = str(run.status.get("state", "unknown"))
        step = run.status.get("step")
        said = [state if step is None else f"{state} at step {step}", str(run.recipe.get("task", ""))]
        courses = {name: run.series(name) for name in (*TOLD, *ELSE)}
        moved = [name for name, line in courses.items() if len(line) > 1]
        for name in [name for name in moved if name in TOLD] or moved[:1]:
            said.append(f"{name} {courses[name][0][1]:.4g} → {courses[name][-1][1]:.4g}")
        reason = run.status.get("reason")
        lines.append(
            f"<p><span class='key key{index % COLOURS}'></span><b>{escape(str(run.path))}</b> "
            f"<span class='{escape(state)}'>{escape(' · '.join(part for part in said if part))}</span>"
            + (f"<br><span class='failed'>{escape(str(reason))}</span>" if reason else "")
            + "".join(f"<br><span class='failed'>damaged: {escape(each)}</span>" for each in run.damaged)
            + "</p>"
        )
    return "".join(lines)


def recipe_differences(runs: list[Run]) -> str:
    rows = [
        [key, *("-" if value is None else value for value in values)] for key, values in differences(runs)
    ]
    if not rows:
        return "<p class='quiet'>The recipes are the same.</p>"
    return table(["key", *(str(run.path) for run in runs)], rows)


def curves(runs: list[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.numbers())
    drawn = {
        name: chart(
            name, [(str(run.path), run.series(name)) for run in runs], [band(run, name) for run in runs]
        )
        for name in names
    }
    first = "".join(drawn[name] for name in FIRST if name in drawn) + (
        together(runs[0]) if len(runs) == 1 else ""
    )
    rest = "".join(figure for name, figure in drawn.items() if name not in FIRST)
    shown = section("Curves", f"<div class='charts'>{first}</div>" if first else "")
    if not rest:
        return shown
    count = sum(name not in FIRST for name in drawn)
    return (
        f"{shown}<details><summary>{count} more metrics</summary><div class='charts'>{rest}</div></details>"
    )


def band(run: Run, name: str) -> list[tuple[float, float, float]]:
    """Mean minus and plus one standard deviation over the samples of a step, where that is logged too."""
    deviations = dict(run.series("reward/std" if name == "reward/mean" else f"{name}/std"))
    return [
        (step, value - deviations[step], value + deviations[step])
        for step, value in run.series(name)
        if step in deviations
    ]


def together(run: Run) -> str:
    """Several metrics of one run in one chart: the reward of each source, and where the time of a step goes."""
    names = run.numbers()
    groups = {
        "reward by source": [name for name in names if f"{name}/std" in names],
        "seconds by phase": [
            name
            for name in names
            if name.startswith("seconds/") and name not in ("seconds/cpu", "seconds/step")
        ],
    }
    return "".join(
        chart(title, [(name.split("/", 1)[1], run.series(name)) for name in members], legend=True)
        for title, members in groups.items()
        if len(members) > 1
    )


def renders(run: Run) -> str:
    """One row of the data as the policy's template writes it, and as each reward model's does."""
    shown = [each for each in run.preflight.get("renders", []) if isinstance(each, dict)]
    policy = next((each["policy"] for each in shown if each.get("policy")), None)
    sides = [("policy", policy)] if policy else []
    sides += [(str(each.get("name") or "reward model"), each["rm"]) for each in shown if each.get("rm")]
    parts = [
        f"<div><p class='quiet'>{escape(name)}</p><pre>{escape(str(text))}</pre></div>"
        for name, text in sides
    ]
    return f"<div class='sides'>{''.join(parts)}</div>" if parts else ""


def of_one(run: Run, several: bool) -> str:
    where = f" of {run.path}" if several else ""
    findings = [
        [row.get("severity"), row.get("id"), row.get("title"), row.get("fix") or ""]
        for row in run.preflight.get("findings", [])
        if isinstance(row, dict)
    ]
    failed = [[*cause, count] for cause, count in run.quarantine.most_common(20)]
    receipt = [
        [key, json.dumps(value, default=str) if isinstance(value, dict | list) else value]
        for key, value in run.launch.items()
        if key not in ("schema", "pid")
    ]
    recipe = [[key, value] for key, value in run.recipe.items()]
    return "".join(
        [
            section(
                f"Preflight{where}", table(["severity", "id", "finding", "fix"], findings) if findings else ""
            ),
            section(f"One row through the templates{where}", renders(run)),
            section(f"Evaluations{where}", evaluations.render(run)),
            section(
                f"Samples{where}", samples.render(run) if run.recipe.get("task") not in ("sft", "rm") else ""
            ),
            section(
                f"Failed rewards{where}",
                table(["source", "status", "cause", "rows"], failed) if failed else "",
            ),
            section(
                f"Recipe and environment{where}",
                f"<details><summary>recipe, {len(recipe)} keys</summary>{table(['key', 'value'], recipe)}</details>"
                f"<details><summary>environment</summary>{table(['', ''], receipt)}</details>",
            ),
        ]
    )
