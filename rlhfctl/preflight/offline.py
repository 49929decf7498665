"""What an oreo run learns from and samples: differences (D015, D018) and prompts for its value (D017)."""

from collections.abc import Iterator

from rlhfctl.errors import Refused, RlhfctlError
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs


def check(inputs: Inputs) -> Iterator[Finding]:
    if inputs.recipe.task == "oreo":
        yield from value_fit_findings(inputs)
        yield from difference_findings(inputs)


def difference_findings(inputs: Inputs) -> list[Finding]:
    """D015: scored answers without a difference to learn from, or steps that no delimiter ends. D018: how many."""
    from rlhfctl.data.encode_offline import OfflineRow, refuse_nothing_to_learn, step_report

    recipe = inputs.recipe
    if recipe.task != "oreo" or recipe.collect is not None:
        return []
    encoded = inputs.encoded("train")
    rows = [row for row in encoded.rows if isinstance(row, OfflineRow)]
    if encoded.every > 1 or not rows:
        return []
    told = Finding("D018", "info", f"data.train: {step_report(rows)}", side="data")
    try:
        refuse_nothing_to_learn(rows, recipe.algorithm)
    except Refused as refusal:
        return [told, Finding("D015", "error", "data.train: nothing to learn", refusal.message, side="data")]
    return [told]


def value_fit_findings(inputs: Inputs) -> list[Finding]:
    """D017: the prompts of value_fit cannot be read, or are all held out."""
    from rlhfctl.data.load import load_samples

    recipe = inputs.recipe
    if recipe.task != "oreo" or recipe.value_fit is None:
        return []
    fit = recipe.value_fit
    what = "value_fit.prompts" if fit.prompts else "data.train"
    try:
        loaded = (
            load_samples(fit.prompts, recipe.data.max_bad_rows) if fit.prompts else inputs.samples("train")
        )
    except RlhfctlError as error:
        return [
            Finding(
                "D017", "error", f"{what} cannot be used", error.message, f"correct {what} or the file", "data",
                exit_code=error.exit_code,
            )
        ]  # fmt: skip
    if len(loaded.samples) > fit.held_out:
        return []
    return [
        Finding(
            "D017",
            "error",
            f"{what} holds {len(loaded.samples)} prompts, and value_fit.held_out keeps {fit.held_out} of them apart",
            "none is left to sample",
            "give more prompts, or lower value_fit.held_out",
            "data",
        )
    ]
