"""report: one HTML file of one or several runs."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from rlhfctl.cli.console import Console
from rlhfctl.cli.exit_codes import DONE
from rlhfctl.cli.options import JsonOption, QuietOption, VerboseOption
from rlhfctl.errors import RunFailed, Unable, UsageError, impossible_path, is_disk_full, unwritable


def report(
    ctx: typer.Context,
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN_DIR...", hidden=True)] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="Where it goes.  [default: RUN_DIR/report.html]"),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on loopback, fresh as the run goes on.")
    ] = False,
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", help="With --watch.  [default: 0, a free one]")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> int:
    """One HTML file of some runs.

    \b
    Curves, what differs between the recipes, preflight findings, best and
    worst samples, failed rewards, recipe and environment. The file needs no
    network and no script; stdout gets its path. Of several runs the default
    is report.html here.

    \b
    Examples:
      rlhfctl report runs/a
      rlhfctl report runs/a runs/b -o compare.html
      rlhfctl report --watch runs/a
    """
    if not runs:
        raise UsageError("report on which run? `rlhfctl report RUN_DIR...`")
    if watch:
        if out is not None:
            raise UsageError("--watch serves the page and writes none: remove -o, or --watch")
        return serve(ctx.obj, runs, port or 0)
    if port is not None:
        raise UsageError("--port is for --watch")
    from rlhfctl.report.page import page
    from rlhfctl.report.read import read_run
    from rlhfctl.run_dir import write_named

    console: Console = ctx.obj
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    read = [read_run(path) for path in runs]
    try:
        write_named(target, page(read))
    except OSError as error:
        if is_disk_full(error) or impossible_path(error):
            raise unwritable(target, error) from None
        raise Unable(f"cannot write {target}: {error.strerror or error}") from None
    told = [
        {
            "run": str(run.path),
            "state": run.status.get("state"),
            "step": run.status.get("step"),
            "damaged": run.damaged,
        }
        for run in read
    ]
    return console.finish(DONE, str(target), fields={"report": str(target), "runs": told})


def serve(console: Console, runs: list[Path], port: int) -> int:
    """Until Ctrl-C or SIGTERM, which is how it is meant to end: exit code 0, as of serve-rm."""
    from rlhfctl.report.read import read_run
    from rlhfctl.report.watch import watch

    for path in runs:
        read_run(path)

    def ready(address: str) -> None:
        console.note("the report, fresh as the run goes on; Ctrl-C ends it")
        if (
            console.finish(DONE, address, fields={"url": address, "runs": [str(path) for path in runs]})
            != DONE
        ):
            raise RunFailed("the address could not be told")

    with contextlib.suppress(KeyboardInterrupt):
        watch(runs, port, ready)
    return DONE
