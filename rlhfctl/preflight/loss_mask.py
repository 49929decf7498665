"""Which tokens would be trained, looked at on real rows: some of each row, never all, the stop token too (M...)."""

from rlhfctl.data.encode import SftRow
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs

ROWS = 200


def check(inputs: Inputs) -> list[Finding]:
    if inputs.answered("train"):
        return []  # what the policy samples is trained, and nothing else
    if inputs.recipe.task == "rm":
        return []  # no token is trained: scores are (judgements.py)
    rows = [row for row in inputs.encoded("train").rows[:ROWS] if isinstance(row, SftRow)]
    return mask_findings(rows, set(inputs.encoder.stop_ids))


def mask_findings(rows: list[SftRow], stops: set[int]) -> list[Finding]:
    findings = []
    empty = [row.id for row in rows if not any(row.mask)]
    full = [row.id for row in rows if len(row.mask) > 1 and all(row.mask)]
    unstopped = [row.id for row in rows if any(row.mask) and not trains_stop(row, stops)]
    if empty:
        findings.append(
            Finding(
                "M001",
                "error",
                f"{len(empty)} of {len(rows)} rows would train no token",
                f"rows {', '.join(empty[:5])}",
                "remove rows without an assistant turn, or correct the chat template",
                "data",
            )
        )
    if full:
        findings.append(
            Finding(
                "M002",
                "error",
                f"{len(full)} of {len(rows)} rows would train every token, the prompt's too",
                f"rows {', '.join(full[:5])}",
                "give rows a prompt, or correct the chat template: it must open the assistant's turn",
                "data",
            )
        )
    if not stops:
        findings.append(
            Finding(
                "M003",
                "error",
                "no stop token is known, so that none can be trained",
                "the tokenizer has no EOS, and neither the template nor generation_config.json names another",
                "set eos_token in tokenizer_config.json",
                "policy",
            )
        )
    elif unstopped:
        findings.append(
            Finding(
                "M003",
                "error" if len(unstopped) == len(rows) else "warning",
                f"in {len(unstopped)} of {len(rows)} rows the last answer does not end with a trained stop token",
                f"stop ids {sorted(stops)}; rows {', '.join(unstopped[:5])}: the policy would not learn to stop",
                "use a chat template that closes the assistant's turn with the EOS or an end-of-turn token",
                "policy",
            )
        )
    return findings


def trains_stop(row: SftRow, stops: set[int]) -> bool:
    """Whether a stop id is among the last trained tokens (a template may put a newline behind it)."""
    last = max(index for index, on in enumerate(row.mask) if on)
    return any(row.ids[index] in stops and row.mask[index] for index in range(max(0, last - 2), last + 1))
