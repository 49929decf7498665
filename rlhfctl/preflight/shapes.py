"""Numbers that must fit each other: batch and ranks, lengths and context, token ids and embedding rows (S...)."""

from collections.abc import Iterator

from rlhfctl.architectures import context_length, longest_row
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Encoded, Inputs, NotThere
from rlhfctl.preflight.machine import world_size
from rlhfctl.recipe.tasks import PpoRecipe


def check(inputs: Inputs) -> Iterator[Finding]:
    yield from batch_findings(inputs)
    yield from embedding_findings(inputs)
    context = longest_row(inputs.config(inputs.policy_path))
    if context is not None:
        for split in ("train", "eval"):
            if getattr(inputs.recipe.data, split):
                yield from length_findings(inputs, split, context)


def batch_findings(inputs: Inputs) -> list[Finding]:
    """S001 fewer samples than ranks, S002 an uneven share."""
    recipe, world = inputs.recipe, world_size(inputs)
    unit, name = recipe.train.batch_size, "train.batch_size"
    if isinstance(recipe, PpoRecipe):
        unit, name = recipe.train.batch_size // recipe.rollout.n, "train.batch_size / rollout.n (prompts)"
    if unit < world:
        return [
            Finding(
                "S001",
                "error",
                f"{name} is {unit} for {world} ranks",
                "some ranks would have nothing to do",
                f"raise train.batch_size to {world * recipe.train.batch_size // unit} or use fewer processes",
                evidence={"unit": unit, "world": world},
            )
        ]
    if unit % world:
        return [
            Finding(
                "S002",
                "error",
                f"{name} is {unit}, which {world} ranks cannot share evenly",
                "the result is the same; some ranks wait for the others",
                f"use a multiple of {world}, other processes, or template.allow=[S002] where waiting is meant",
                evidence={"unit": unit, "world": world},
            )
        ]
    return []


def embedding_findings(inputs: Inputs) -> list[Finding]:
    """S003: token ids that the model has no embedding for."""
    try:
        tokens = highest_id(inputs) + 1
        rows = embedding_rows(inputs, inputs.policy_path, held=inputs.recipe.policy.path is not None)
    except NotThere:
        return []
    if rows is None or tokens <= rows:
        return []
    return [
        Finding(
            "S003",
            "error",
            f"the tokenizer has ids up to {tokens - 1}, the model {rows} embedding rows",
            f"tokenizer {inputs.tokenizer_path}, model {inputs.policy_path}",
            "use the tokenizer that belongs to the model, or a model whose embedding was resized",
            "policy",
            {"tokens": tokens, "rows": rows},
        )
    ]


def embedding_rows(inputs: Inputs, path: str, held: bool = True) -> int | None:
    """held: of the weights, where they are here; else of the configuration."""
    rows = inputs.config(path).get("vocab_size")
    for name, entry in (inputs.checkpoint(path).tensors if held else {}).items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")):
            rows = entry.shape[0]
    return rows if isinstance(rows, int) else None


def highest_id(inputs: Inputs) -> int:
    vocabulary: dict[str, int] = inputs.encoder.tokenizer.get_vocab(with_added_tokens=True)
    return max(vocabulary.values())


def length_findings(inputs: Inputs, split: str, context: int) -> list[Finding]:
    """S004 rows longer than the model's context, S005 a limit above it that no row reaches."""
    encoded = inputs.encoded(split)
    if not encoded.lengths:
        return []
    longest = max(encoded.lengths)
    recipe = inputs.recipe
    if inputs.answered(split):
        new = inputs.rollout.max_new_tokens
        if longest + new <= context:
            return []
        return [too_long(inputs, split, encoded, context, new)]
    if longest > context:
        return [too_long(inputs, split, encoded, context, 0)]
    if split == "train" and recipe.data.max_length > context:
        return [
            Finding(
                "S005",
                "warning",
                f"data.max_length is {recipe.data.max_length}, more than {reach(inputs, context)}",
                f"the longest row has {longest}",
                f"set data.max_length to at most {context}",
                evidence={"context": context, "longest": longest},
            )
        ]
    return []


def too_long(inputs: Inputs, split: str, encoded: Encoded, context: int, new: int) -> Finding:
    over = sum(length + new > context for length in encoded.lengths)
    room = context - new
    what = f"prompt and rollout.max_new_tokens ({new})" if new else "row"
    why = (
        "; a longer one has all rows of its pack turned by the long ones" if short_of(inputs, context) else ""
    )
    if not new:
        fix = f"set data.max_length to at most {context}"
    elif room > min(encoded.lengths):
        fix = f"set rollout.max_prompt_length to at most {room}, or lower rollout.max_new_tokens"
    else:
        fix = "lower rollout.max_new_tokens, or use a model with a longer context"
    return Finding(
        "S004",
        "error",
        f"data.{split}: {over} of {len(encoded.lengths)} rows do not fit {reach(inputs, context)}",
        f"the longest {what} needs {max(encoded.lengths) + new} tokens{why}",
        fix,
        "data",
        {"context": context, "longest": max(encoded.lengths), "max_new_tokens": new, "rows": over},
    )


def short_of(inputs: Inputs, context: int) -> bool:
    """Whether the model itself reaches further than rows may."""
    return context != context_length(inputs.config(inputs.policy_path))


def reach(inputs: Inputs, context: int) -> str:
    if short_of(inputs, context):
        return f"the {context} tokens that the model's longrope reads by its short factors"
    return f"the model's context of {context} tokens"
