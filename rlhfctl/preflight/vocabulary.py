"""Models that read the policy's token ids: its words must be theirs (W024)."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, locate
from rlhfctl.preflight.shapes import embedding_rows, highest_id
from rlhfctl.recipe.tasks import OreoRecipe, PpoRecipe


def check(inputs: Inputs) -> Iterator[Finding]:
    ours = words(inputs.directory(inputs.tokenizer_path))
    for key, path in readers(inputs):
        if locate(path) is not None:
            yield from other_words(inputs, key, path, ours)


def readers(inputs: Inputs) -> Iterator[tuple[str, str]]:
    """(recipe key, path) of the models beside the policy that are fed its token ids; the policy itself where its
    tokenizer is another directory's."""
    recipe = inputs.recipe
    policy = recipe.policy
    if policy.path is not None and policy.tokenizer is not None:
        yield "policy.path", policy.path
    if isinstance(recipe, PpoRecipe | OreoRecipe) and recipe.reference is not None:
        yield "reference", recipe.reference
    yield from inputs.started_from.items()


def words(directory: Path) -> dict[int, str]:
    """By id, without the added tokens, which finetunes rename and add to; {} where there is no tokenizer.json."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return {}
    tokenizer = Tokenizer.from_file(str(file))
    added = tokenizer.get_added_tokens_decoder()
    held = tokenizer.get_vocab(with_added_tokens=False)
    return {id: word for word, id in held.items() if id not in added}


def other_words(inputs: Inputs, key: str, path: str, ours: dict[int, str]) -> Iterator[Finding]:
    theirs = words(inputs.directory(path))
    odd = next((id for id in sorted(ours) if id in theirs and theirs[id] != ours[id]), None)
    rows = None if key == "policy.path" else embedding_rows(inputs, path)  # of the policy S003 says it
    what = "the policy" if key != "policy.path" else "policy.tokenizer"
    if odd is not None:
        detail = (
            f"{len(theirs)} and {len(ours)} words; id {odd} is {theirs[odd]!r} there and {ours[odd]!r} here: "
            "it would read other words"
        )
    elif rows is not None and highest_id(inputs) >= rows:
        detail = f"the policy's ids go up to {highest_id(inputs)}, its embedding has {rows} rows"
    else:
        return
    yield Finding(
        "W024",
        "error",
        f"{key}: {path} has another vocabulary than {what}",
        detail,
        "use a model of the same tokenizer" + fix_of(key),
        "policy",
    )


def fix_of(key: str) -> str:
    return {
        "policy.path": ", or leave policy.tokenizer out",
        "reference": ", or leave reference out: the policy as it starts",
        "value_model.init": ", or value_model.init: policy",
        "implicit_prm.path": ", or leave path out: the policy as it starts",
    }[key]
