"""The template gate on a recipe: the policy against every reward model, with the recipe's own data."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rlhfctl.errors import RlhfctlError, TemplateMismatch
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, NotThere, locate
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.templates.traits import Traits

if TYPE_CHECKING:
    from rlhfctl.preflight.conversations import Conversations
    from rlhfctl.recipe.sections import ModelSource
    from rlhfctl.recipe.tasks import AnyRecipe
    from rlhfctl.templates.inspect import Report
    from rlhfctl.templates.sides import Side

# Findings that say something about a run of this task; the others are for inspect-template.
TRAINED = {
    "T001", "T002", "T003", "T004", "T005", "T007", "T008", "T010", "T011", "T012", "T013", "T014", "T016", "T018",
    "T019", "T021", "T024", "T025", "T030", "T031", "T032", "T033", "T035", "T036", "T037", "K001", "K003", "K004",
    "K009", "K010", "K012", "K013", "K014",
}  # fmt: skip
SAMPLED = (TRAINED - {"T025", "T030", "T031", "T033", "T035", "T036", "T037"}) | {
    "T023",
    "T026",
    "K011",
}
# Nothing is added when rendered text is encoded, and loss masks come from character offsets.
SAFE = {"K001", "K010", "K013", "T025"}
# With ppo response ids are sampled and trained as they are; the policy's template never renders a response.
SAMPLED_SAFE = {"T024", "T032", "K011"}


# One of them is there.
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check(inputs: Inputs) -> Iterator[Finding]:
    place = locate(inputs.tokenizer_path)
    if place is not None and not any((place / name).exists() for name in TOKENIZER):
        yield Finding(
            "T000",
            "error",
            "the policy has no tokenizer",
            f"{inputs.tokenizer_path} holds none of {', '.join(TOKENIZER)}",
            "copy the base model's tokenizer files there, or set policy.tokenizer to a directory with tokenizer.json",
            "policy",
            exit_code=5,
        )
        return
    try:
        _ = inputs.encoder
    except TemplateMismatch:
        pass  # check_gate says so
    except RlhfctlError as error:
        yield Finding(
            "T000",
            "error",
            "the policy's tokenizer cannot be read",
            error.message,
            "point policy.path or policy.tokenizer to a directory with tokenizer.json",
            "policy",
            exit_code=5,
        )


def check_gate(inputs: Inputs) -> Iterator[Finding]:
    """A finding on the policy once, those on reward models for each of them; nothing of info level."""
    from rlhfctl.preflight.conversations import of_samples
    from rlhfctl.preflight.remote import remote_sides

    recipe = inputs.recipe
    inputs.directory(inputs.tokenizer_path)
    conversations: Conversations | None = None
    with suppress(NotThere):  # the data check has reported it
        conversations = of_samples(inputs.samples("train").samples, isinstance(recipe, PpoRecipe))
    seen = set()
    models = [model for model in inputs.reward_models if readable(inputs, model.path)]
    remote = [] if inputs.quick else remote_sides(recipe.reward)
    names: list[str | None] = [*(model.path for model in models), *(side.name for side in remote)]
    row = conversations[0][1] if conversations else None
    reports = gate(recipe, conversations, models=models, remote=remote, messages=row)
    for report, name in zip(reports, names or [None], strict=True):
        inputs.renders.append({"name": name, **report.renders})
        for found in report.findings:
            key = (found.id, found.side, found.detail)
            if found.severity == "info" or key in seen:
                continue
            seen.add(key)
            if found.side == "policy" and found.id not in (
                TRAINED if not isinstance(recipe, PpoRecipe) else SAMPLED
            ):
                continue
            if found.id == "K012" and found.side == "policy" and not concerns_k012(recipe, found):
                continue
            if recipe.template.on_mismatch == "warn" and found.severity == "error":
                found.severity = "warning"
            yield found


def readable(inputs: Inputs, path: str) -> bool:
    """A reward model that is not there is another check's finding."""
    try:
        inputs.directory(path)
    except NotThere:
        return False
    return True


def gate(
    recipe: "AnyRecipe",
    conversations: "Conversations | None",
    models: "list[ModelSource] | None" = None,
    clock: datetime | None = None,
    messages: "list[dict[str, Any]] | None" = None,
    remote: "Sequence[Side]" = (),
) -> "list[Report]":
    """One report per reward model, or one on the policy alone. models: default, all of the recipe; remote: those that
    a handshake told of.

    Raises UsageError for a side that cannot be read."""
    from rlhfctl.preflight.conversations import look
    from rlhfctl.recipe.sections import ModelSource
    from rlhfctl.templates.checks.lost import shapes
    from rlhfctl.templates.inspect import Options, inspect
    from rlhfctl.templates.sides import load_side

    if models is None:
        sources = recipe.reward.sources if recipe.reward is not None else []
        models = [source for source in sources if isinstance(source, ModelSource)]
    policy = recipe.policy
    left = load_side(policy.tokenizer or policy.path or "", policy.chat_template, policy.template_kwargs)
    section = recipe.template
    shown, seen = look(conversations or [])
    sampled = isinstance(recipe, PpoRecipe)
    options = Options(
        clock=clock,
        bridge=section.bridge,
        fold_system=section.fold_system,
        merge_roles=section.merge_roles,
        allow=frozenset(section.allow),
        conversations=shown,
        traits=task_traits(recipe, seen),
        rows=shapes(conversations, conversations.tools) if conversations is not None else [],
        policy_reads="prompts" if sampled else "bridged" if recipe.task == "rm" else "conversations",
        complete=conversations is not None,
        messages=messages,
    )
    reports = []
    rights: list[Side | None] = [load_side(model.path, None, model.template_kwargs) for model in models]
    rights += remote
    for right in rights or [None]:
        report = inspect(left, right, options)
        for found in report.findings:
            if found.id == "K012" and found.side == "policy" and conversations is not None and not sampled:
                _forged(found, report.markers[0], conversations)
            safe = sampled and found.side == "policy" and found.id in SAMPLED_SAFE
            found.handled = found.handled or safe or found.id in SAFE or found.id in section.allow
        reports.append(report)
    return reports


def _forged(found: Finding, markers: "Sequence[str]", conversations: "Conversations") -> None:
    """K012 with the rows whose contents spell a special token: what is trained is what they hold."""
    spelled = re.compile("|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)))
    rows: list[str] = []
    answers: list[str] = []
    for origin, messages in conversations:
        roles = [
            m.get("role")
            for m in messages
            if isinstance(m.get("content"), str) and spelled.search(m["content"])
        ]
        rows += [origin] if roles else []
        answers += [origin] if "assistant" in roles else []
    if rows:
        said = f"an answer of {answers[0]}" if answers else rows[0]
        found.detail += f"; {len(rows)} rows hold special tokens in their text, first {said}"
        found.evidence = {
            **found.evidence,
            "rows": len(rows),
            "answers": len(answers),
            "data": (answers or rows)[0],
        }


def concerns_k012(recipe: "AnyRecipe", found: Finding) -> bool:
    """A policy may sample any marker. What is trained from data holds those that the data holds, and none where the
    text is encoded as the bridge does."""
    if isinstance(recipe, PpoRecipe):
        return True
    return recipe.task != "rm" and "rows" in found.evidence


def task_traits(recipe: "AnyRecipe", seen: Traits) -> Traits:
    """Several answers in one conversation matter only where all of them are trained from one render."""
    if recipe.task != "sft" or recipe.data.train_on == "last_assistant":
        return Traits(
            seen.rows, {trait: row for trait, row in seen.found.items() if trait != "several_answers"}
        )
    return seen
