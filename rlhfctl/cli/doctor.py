"""doctor: what this machine can run, and what to install."""

import typer

from rlhfctl.cli.console import Console
from rlhfctl.cli.exit_codes import DONE, UNABLE
from rlhfctl.cli.options import JsonOption, QuietOption, VerboseOption


def doctor(
    ctx: typer.Context,
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
    Examples:
      rlhfctl doctor
      rlhfctl doctor --json | jq '.checks[] | select(.status != "ok")'
    """
    from dataclasses import asdict

    from rlhfctl.preflight.survey import survey

    console: Console = ctx.obj
    rows = survey()
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "warn", "fail")}
    shown = [row for row in rows if not (console.quiet and row.status == "ok")]
    width = max(len(row.name) for row in rows)
    lines = [
        f"{row.status:4}  {row.name:{width}}  {row.found}" + (f"  -> {row.fix}" if row.fix else "")
        for row in shown
    ]
    failed = [row.name for row in rows if row.status == "fail"]
    message = f"this machine cannot train: {', '.join(failed)}" if failed else None
    fields = {"checks": [asdict(row) for row in rows], "summary": counts}
    return console.finish(UNABLE if failed else DONE, "\n".join(lines), message, fields)
