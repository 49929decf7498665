"""The options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

PATHS_OF = ("FILE", "DIR", "F", "JSON")  # metavars of options that take a path

RecipeArgument = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE", hidden=True),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", hidden=True),
]
RunDirOption = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="DIR", help="Where the run is kept.  [default: runs/NAME/DATE]"),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --run-dir from its checkpoint.")
]
DryRunOption = Annotated[
    bool, typer.Option("-n", "--dry-run", help="Check everything, print the resolved recipe, start nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, on failure too.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Tracebacks, as with RLHFCTL_DEBUG=1.")]
