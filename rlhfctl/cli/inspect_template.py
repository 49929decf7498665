"""inspect-template: a policy's chat template, alone or against a reward model's."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfctl.cli.console import Console
from rlhfctl.cli.options import JsonOption, QuietOption, VerboseOption
from rlhfctl.errors import UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from rlhfctl.templates.inspect import Report

Text = str | None


def inspect_template(
    ctx: typer.Context,
    policy: Annotated[Text, typer.Argument(metavar="POLICY", hidden=True)] = None,
    reward_model: Annotated[Text, typer.Argument(metavar="REWARD_MODEL", hidden=True)] = None,
    data: Annotated[
        Text, typer.Option(metavar="FILE", help="Weigh findings by what these rows hold.")
    ] = None,
    messages: Annotated[Text, typer.Option(metavar="FILE", help="JSON messages to render.")] = None,
    policy_template: Annotated[
        Text, typer.Option(metavar="F", help="The policy's .jinja, not its own.")
    ] = None,
    rm_template: Annotated[Text, typer.Option(metavar="F", help="The reward model's .jinja.")] = None,
    policy_tokens: Annotated[Text, typer.Option(metavar="JSON", help="Tokens of a bare .jinja file.")] = None,
    rm_tokens: Annotated[Text, typer.Option(metavar="JSON", help="The same for the reward model.")] = None,
    clock: Annotated[Text, typer.Option(metavar="DATE", help="What templates take for today.")] = None,
    bridge: Annotated[bool, typer.Option("--bridge", help="What the bridge repairs is handled.")] = False,
    fold_system: Annotated[bool, typer.Option("--fold-system", help="... with system text folded.")] = False,
    merge_roles: Annotated[
        bool, typer.Option("--merge-roles", help="... with repeated roles merged.")
    ] = False,
    render: Annotated[bool, typer.Option("--render", help="Print both renders, side by side.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings exit 3 as well.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Compare two models' chat templates.

    \b
    POLICY, REWARD_MODEL  a model or tokenizer directory, a .jinja or .gguf
                          file; POLICY alone may be a recipe (both sides)
    Tokens: {"bos": "<s>", "eos": "</s>", "pad": null, "eot": "</s>",
             "adds_bos": true}, inline or a file; what is left out is unknown

    \b
    Examples:
      rlhfctl inspect-template models/qwen models/llama-rm --bridge
      rlhfctl inspect-template chat.jinja --policy-tokens '{"eos": "</s>"}'
      rlhfctl inspect-template my-ppo.yaml --render
    """
    if policy is None:
        raise UsageError("inspect which policy? `rlhfctl inspect-template POLICY [REWARD_MODEL]`")
    now = moment(clock)
    if is_recipe(policy):
        given = {
            "REWARD_MODEL": reward_model, "--policy-template": policy_template, "--rm-template": rm_template,
            "--policy-tokens": policy_tokens, "--rm-tokens": rm_tokens, "--bridge": bridge,
            "--fold-system": fold_system, "--merge-roles": merge_roles,
        }  # fmt: skip
        extra = next((name for name, value in given.items() if value), None)
        if extra is not None:
            raise UsageError(f"{policy} is a recipe, which decides {extra} itself: leave {extra} out")
        reports = of_recipe(ctx.obj, policy, data, messages, now, strict)
    else:
        reports = of_sides(
            (policy, policy_template, policy_tokens), (reward_model, rm_template, rm_tokens), data, messages,
            clock=now, bridge=bridge, fold_system=fold_system, merge_roles=merge_roles, strict=strict,
        )  # fmt: skip
    return tell(ctx.obj, reports, render)


def of_sides(
    left: tuple[str, Text, Text], right: tuple[Text, Text, Text], data: Text, messages: Text, **options: Any
) -> "list[Report]":
    from rlhfctl.templates.inspect import Options, inspect
    from rlhfctl.templates.sides import load_side

    path, template, tokens = left
    policy = load_side(path, template, tokens=token_names("--policy-tokens", tokens))
    path, template, tokens = right[0] or "", right[1], right[2]
    if not path and (template or tokens):
        raise UsageError("--rm-template and --rm-tokens are about a REWARD_MODEL, and there is none")
    rm = load_side(path, template, tokens=token_names("--rm-tokens", tokens)) if path else None
    return [inspect(policy, rm, Options(**options, **rows(data), messages=conversation(messages)))]


def of_recipe(
    console: Console, source: str, data: Text, messages: Text, now: "datetime | None", strict: bool
) -> "list[Report]":
    """The recipe's own sides, options and training data; --data takes the place of the data."""
    from rlhfctl.errors import RlhfctlError
    from rlhfctl.preflight.conversations import of_samples, read_conversations
    from rlhfctl.preflight.inputs import Inputs
    from rlhfctl.preflight.remote import remote_sides
    from rlhfctl.preflight.template import gate
    from rlhfctl.recipe.load import load_recipe
    from rlhfctl.recipe.tasks import PpoRecipe

    recipe = load_recipe(source).recipe
    found = None
    if data is not None:
        found = read_conversations(data)
    else:
        try:
            found = of_samples(
                Inputs(recipe, None, True).samples("train").samples, isinstance(recipe, PpoRecipe)
            )
        except RlhfctlError:  # templates can be compared before the data is there
            found = None
    missed: list[str] = []
    remote = remote_sides(recipe.reward, missed)
    for cause in missed:
        console.error(f"warning: a remote reward is not compared: {cause}")
    reports = gate(recipe, found, clock=now, messages=conversation(messages), remote=remote)
    for report in reports:
        report.options.strict = strict
        if recipe.template.on_mismatch == "warn":
            for each in report.findings:
                each.severity = "warning" if each.severity == "error" else each.severity
    return reports


def tell(console: Console, reports: "list[Report]", render: bool) -> int:
    from rlhfctl.templates.report import lines

    code = max(report.exit_code for report in reports)
    # Of a recipe with several reward models the object tells the facts of the first, what was found with any of them,
    # and in `pairs` each alone.
    every = {str(found.as_dict()): found for report in reports for found in report.findings}
    fields = replace(reports[0], findings=list(every.values())).as_dict()
    if len(reports) > 1:
        fields["pairs"] = [report.as_dict() for report in reports]
    for name in ("schema", "status", "exit_code"):
        fields.pop(name)
    text = "\n\n".join("\n".join(lines(report, render)) for report in reports)
    return console.finish(code, text, fields=fields)


def is_recipe(source: str) -> bool:
    from pathlib import Path

    from rlhfctl.recipe.catalogue import shipped_path

    if source == "-" or source.endswith((".yaml", ".yml")):
        return True
    return not Path(source).exists() and shipped_path(source) is not None


def token_names(option: str, given: Text) -> dict[str, Any] | None:
    import json
    from pathlib import Path

    from rlhfctl.templates.files import read_text

    if given is None:
        return None
    text = given if given.lstrip().startswith("{") else read_text(Path(given))
    try:
        value = json.loads(text, object_pairs_hook=once_each)
    except json.JSONDecodeError as error:
        raise UsageError(f"{option} is not JSON: {error.msg} at character {error.pos}") from None
    except KeyError as error:
        raise UsageError(f"{option} gives {error.args[0]} twice: leave one out") from None
    if not isinstance(value, dict):
        raise UsageError(f'{option} is not a JSON object such as {{"bos": "<s>", "eos": "</s>"}}')
    return value


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values; json keeps the last of two equal keys in silence. Raises KeyError."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def rows(data: Text) -> dict[str, Any]:
    if data is None:
        return {}
    from rlhfctl.preflight.conversations import look, read_conversations
    from rlhfctl.templates.checks.lost import shapes

    conversations = read_conversations(data)
    shown, seen = look(conversations)
    return {"conversations": shown, "traits": seen, "rows": shapes(conversations, conversations.tools)}


def conversation(path: Text) -> list[dict[str, Any]] | None:
    if path is None:
        return None
    from rlhfctl.preflight.conversations import read_messages

    return read_messages(path)


def moment(clock: Text) -> "datetime | None":
    from datetime import datetime

    if clock is None:
        return None
    try:
        return datetime.fromisoformat(clock)
    except ValueError:
        raise UsageError(f"--clock {clock} is no date: give one as 2025-01-15") from None
