"""Rollouts in the report: the best, the worst and a few others, tokens coloured by their reward or advantage."""

import random
from html import escape
from typing import Any

from rlhfctl.report.read import Run

EACH = 3
COLUMNS = (("rewards", "reward"), ("advantages", "advantage"), ("log_ratios", "log pi / pi_ref"))


def chosen(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """(best | worst | random, record): by shaped reward among the newest records; the same ones every time."""
    scored = [row for row in run.samples if isinstance(row.get("shaped_reward"), int | float)]
    ordered = sorted(scored, key=lambda row: float(row["shaped_reward"]))
    worst, best = ordered[:EACH], ordered[EACH:][-EACH:][::-1]
    rest = ordered[EACH:-EACH]
    others = random.Random(len(rest)).sample(rest, min(EACH, len(rest)))
    return [
        *(("best", row) for row in best),
        *(("worst", row) for row in worst),
        *(("random", row) for row in others),
    ]


def render(run: Run) -> str:
    picked = chosen(run)
    if not picked:
        return "<p class='quiet'>No samples were kept: <code>train.samples_every=1</code> keeps them.</p>"
    return "".join(card(kind, row) for kind, row in picked)


def card(kind: str, row: dict[str, Any]) -> str:
    facts = [f"step {row.get('step')}", f"reward {row['shaped_reward']:.4g}", f"{row.get('tokens')} tokens"]
    if row.get("truncated"):
        facts.append("cut by max_new_tokens")
    facts += [
        f"{name} {value:.4g}" for name, value in (row.get("reward_metrics") or {}).items() if _number(value)
    ]
    table = next((value for value in row.values() if isinstance(value, dict) and "texts" in value), None)
    body = f"<pre>{escape(str(row.get('response', '')))}</pre>"
    if table is not None:
        shown = [coloured(table, key, title) for key, title in COLUMNS if _any(table.get(key))]
        body = "".join(shown) or body
    return (
        f"<details {'open' if kind != 'random' else ''}><summary><b>{kind}</b> {escape(', '.join(facts))}</summary>"
        f"<pre class='prompt'>{escape(str(row.get('prompt', '')))}</pre>{body}</details>"
    )


def coloured(table: dict[str, Any], key: str, title: str) -> str:
    """The response with each token's background by its number: one hue for above zero, another for below."""
    values = table[key]
    largest = max((abs(value) for value in values if _number(value)), default=0.0) or 1.0
    parts = []
    for text, value in zip(table["texts"], values, strict=False):
        if not _number(value):
            parts.append(f"<span class='observed'>{escape(str(text))}</span>")
            continue
        strength = round(abs(value) / largest * 0.75, 3)
        side = "above" if value >= 0 else "below"
        parts.append(
            f"<span class='{side}' style='--a:{strength}' title='{value:.4g}'>{escape(str(text))}</span>"
        )
    return f"<p class='quiet'>{escape(title)}, darkest at {largest:.3g}</p><pre>{''.join(parts)}</pre>"


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _any(values: object) -> bool:
    return isinstance(values, list) and any(_number(value) for value in values)
