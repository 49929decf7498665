"""What a reward model learns from: labels that differ, more than length (D007, D008), steps (D019), a head (W013)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.model import find_head, head_findings

if TYPE_CHECKING:
    from rlhfctl.data.encode_judged import JudgedRow

ENCODERS = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert"),
    *("mpnet", "roberta", "xlm-roberta"),
)
CLASSIFIERS = ("classifier.weight", "classifier.out_proj.weight")
LENGTH_RULE = 0.65  # share of pairs that their length alone decides, from which it is worth a warning


def check(inputs: Inputs) -> Iterator[Finding]:
    if inputs.recipe.task != "rm":
        return
    yield from encoder_findings(inputs)
    yield from start_findings(inputs)
    yield from padding_findings(inputs)
    for split in ("train", "eval"):
        if getattr(inputs.recipe.data, split):
            rows: list[JudgedRow] = inputs.encoded(split).rows  # type: ignore[assignment]
            yield from label_findings(split, rows)
            yield from length_findings(split, rows)
    if inputs.has_samples("train"):
        yield from step_findings(inputs)


def encoder_findings(inputs: Inputs) -> list[Finding]:
    """W015: keys that a reward model over an encoder cannot follow."""
    recipe = inputs.recipe
    assert recipe.task == "rm"
    if inputs.config(inputs.policy_path).get("model_type") not in ENCODERS:
        return []
    wrong = [
        (recipe.policy.lora is not None, "policy.lora: it is trained whole"),
        (
            recipe.algorithm.score != "last_token",
            "algorithm.score token_sum: it gives one score a conversation",
        ),
        (recipe.algorithm.steps, "step labels: it gives one score a conversation"),
    ]
    return [
        Finding(
            "W015",
            "error",
            f"{inputs.policy_path} is an encoder, and the recipe asks for what needs a decoder",
            said,
            "leave the key out, or start from a decoder",
            side="policy",
        )
        for holds, said in wrong
        if holds
    ]


def start_findings(inputs: Inputs) -> list[Finding]:
    """W008, W009 an unusable head in the checkpoint, W013 which head training starts from."""
    recipe = inputs.recipe
    path = recipe.policy.path
    if recipe.task != "rm" or path is None or recipe.algorithm.head != "auto":
        return []
    checkpoint, config = inputs.checkpoint(path), inputs.config(path)
    if checkpoint.problems or not checkpoint.tensors:
        return []
    entry = find_head(checkpoint, config)
    if entry is None and config.get("model_type") in ENCODERS:
        entry = next((checkpoint.tensors[name] for name in CLASSIFIERS if name in checkpoint.tensors), None)
    if entry is not None:
        fix = "algorithm.head: zero starts from a new head"
        if found := head_findings("policy.path", path, entry, config, fix):
            return found
    what = (
        "starts from the checkpoint's reward head"
        if entry
        else "gets a new reward head, which starts at zero"
    )
    return [Finding("W013", "info", f"policy.path: {path} {what}", side="policy")]


def padding_findings(inputs: Inputs) -> list[Finding]:
    """W014: transformers reads a score at the last token that is not padding."""
    encoder = inputs.encoder
    if encoder.pad_id is None or encoder.pad_id not in encoder.stop_ids:
        return []
    token = encoder.tokenizer.id_to_token(encoder.pad_id)
    return [
        Finding(
            "W014",
            "warning",
            f"the padding token {token} also ends answers: scores are read at the token before it",
            "transformers takes it for padding wherever it stands, and training reads where transformers will",
            "set another pad_token in tokenizer_config.json",
            "policy",
        )
    ]


def label_findings(split: str, rows: "list[JudgedRow]") -> list[Finding]:
    """D007: there is nothing to tell apart."""
    targets = {row.target for row in rows if row.target is not None}
    if any(row.target is not None and row.rejected is not None for row in rows):
        targets |= {0.0, 1.0}
    steps = {label for row in rows for label in row.step_labels if label is not None}
    findings = []
    for what, found in (("answer", targets), ("step", steps)):
        if len(found) == 1:
            findings.append(
                Finding(
                    "D007",
                    "error" if split == "train" else "warning",
                    f"data.{split}: every {what} has the same label ({next(iter(found)):g})",
                    "a model that always says the same would be right",
                    "add rows of the other kind, or look at algorithm.outcome_threshold",
                    "data",
                )
            )
    return findings


def step_findings(inputs: Inputs) -> list[Finding]:
    """D019: the trained model is read where its separator ends a step, and these rows train other places."""
    from rlhfctl.templates.places import split_steps

    recipe = inputs.recipe
    assert recipe.task == "rm"
    if recipe.algorithm.read != "step_end":
        return []
    separator = recipe.data.train[0].step_separator
    parted = [
        (sample.origin, each)
        for sample in inputs.samples("train").samples
        if (each := sample.judgement) is not None and each.steps
    ]
    other = [
        origin
        for origin, each in parted
        if [part.strip() for part in split_steps(each.separator.join(each.steps or []), separator)]
        != [step.strip() for step in each.steps or []]
    ]
    if not other:
        return []
    return [
        Finding(
            "D019",
            "warning",
            f"data.train: {len(other)} of {len(parted)} answers have other steps than {separator!r} cuts them into",
            f"{', '.join(other[:3])}: final/ is read where {separator!r} ends a step (step_separator of the first "
            "source), also inside these steps, and was not trained there",
            "set one step_separator that no step holds in all sources, or split these steps",
            "data",
            {"count": len(other)},
        )
    ]


def length_findings(split: str, rows: "list[JudgedRow]") -> list[Finding]:
    """D008: how far a rule comes that looks at nothing but length."""
    pairs = [row for row in rows if row.rejected is not None]
    if not pairs:
        return []
    longer = sum(
        1.0 if len(row.chosen.ids) > len(row.rejected.ids) else 0.5
        for row in pairs
        if row.rejected is not None and len(row.chosen.ids) >= len(row.rejected.ids)
    ) / len(pairs)
    if max(longer, 1 - longer) < LENGTH_RULE:
        return []
    side = "longer" if longer > 0.5 else "shorter"
    return [
        Finding(
            "D008",
            "warning",
            f"data.{split}: the {side} answer is the chosen one in {max(longer, 1 - longer):.0%} of the pairs",
            "a reward model can learn length from them, and a policy will then learn it from the model",
            "compare eval/accuracy with eval/length_accuracy; balance the lengths of the pairs",
            "data",
            {"longer_chosen": longer},
        )
    ]
