"""doctor: what this machine can run, and what to install; and whether a recipe's resume is exact."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhfctl.cli.console import Console, hanging, terminal_width
from rlhfctl.cli.exit_codes import DONE, FAILED, UNABLE
from rlhfctl.cli.options import JsonOption, OverridesArgument, QuietOption, RecipeArgument, VerboseOption
from rlhfctl.errors import UsageError


def doctor(
    ctx: typer.Context,
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    verify_resume: Annotated[
        bool, typer.Option("--verify-resume", help="Prove on RECIPE that a killed run resumes exactly.")
    ] = False,
    steps: Annotated[
        str | None, typer.Option(metavar="N,M", help="Steps before the kill, and after it.  [default: 2,2]")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep both runs there.  [default: a temporary one]")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> int:
    """What this machine can run, and what to install.

    \b
    One line a subject: ok, warn or fail, its name, what was found, and what
    to do. Optional packages that are missing are warnings; with a fail, no
    training works here, and the exit code is 4. -q leaves out what is ok.

    \b
    --verify-resume RECIPE [KEY=VALUE...] runs N + M steps, and N steps,
    kill -9 and M more from the checkpoint; every metric and weight must be
    equal to the last bit. Exit code 1 names the first that is not.

    \b
    Examples:
      rlhfctl doctor
      rlhfctl doctor --json | jq '.checks[] | select(.status != "ok")'
      rlhfctl doctor --verify-resume my.yaml train.batch_size=8 --steps 3,2
    """
    console: Console = ctx.obj
    if verify_resume:
        return prove(console, recipe, overrides or [], steps or "2,2", keep)
    if recipe is not None:
        raise UsageError(
            "doctor looks at the machine, a recipe is for --verify-resume; "
            f"what {recipe} needs here is told by `rlhfctl TASK {recipe} --dry-run`"
        )
    if steps is not None or keep is not None:
        raise UsageError(f"{'--keep' if steps is None else '--steps'} is for --verify-resume")
    return look_around(console)


def look_around(console: Console) -> int:
    from dataclasses import asdict

    from rlhfctl.preflight.survey import survey

    rows = survey()
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "warn", "fail")}
    shown = [row for row in rows if not (console.quiet and row.status == "ok")]
    width = max(len(row.name) for row in rows)
    told = [
        (f"{row.status:4}  {row.name:{width}}  ", row.found + (f"  -> {row.fix}" if row.fix else ""))
        for row in shown
    ]
    lines = hanging(told, terminal_width(sys.stdout))
    failed = [row.name for row in rows if row.status == "fail"]
    message = f"this machine cannot train: {', '.join(failed)}" if failed else None
    fields = {"checks": [asdict(row) for row in rows], "summary": counts}
    return console.finish(UNABLE if failed else DONE, "\n".join(lines), message, fields)


def prove(console: Console, source: str | None, overrides: list[str], steps: str, keep: Path | None) -> int:
    from dataclasses import asdict

    from rlhfctl.launch.verify_resume import kept_or_temporary, verify_resume
    from rlhfctl.recipe.load import load_recipe

    first, then = two_counts(steps)
    if source is None:
        raise UsageError("which recipe? `rlhfctl doctor --verify-resume RECIPE [KEY=VALUE]...`")
    recipe = load_recipe(source, overrides).recipe
    with kept_or_temporary(keep) as directory:
        verdict = verify_resume(recipe, first, then, directory, console.note)
    lines = [
        *(f"bounded  {key}  {change}" for key, change in verdict.bounded.items()),
        *(f"killed   after step {kill.logged}, resumed from {kill.resumed_from}" for kill in verdict.kills),
    ]
    width = max(len(each.what) for each in verdict.compared)
    for each in verdict.compared:
        found = each.counted if each.difference is None else each.where
        lines.append(f"{'same' if each.difference is None else 'differs':7}  {each.what:{width}}  {found}")
    worst = verdict.first_difference
    message = None if worst is None else f"the resume is not exact: {worst.what}, {worst.where}"
    fields = {
        "task": recipe.task,
        "steps": [first, then],
        "bounded": verdict.bounded,
        "kills": [asdict(kill) for kill in verdict.kills],
        "compared": [asdict(each) for each in verdict.compared],
        "directory": None if keep is None else str(keep),
    }
    return console.finish(DONE if worst is None else FAILED, "\n".join(lines), message, fields)


def two_counts(text: str) -> tuple[int, int]:
    """`3,2` to (3, 2). Raises UsageError."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--steps {text}: give two counts from 1, as in --steps 2,2")
    return int(parts[0]), int(parts[1])
