"""Commands of the contract that this version does not have: they say so, take anything, and pretend nothing."""

from collections.abc import Callable

import typer

from rlhfctl.errors import UsageError

# Shown in the help; a command leaves this table when it is built.
COMMANDS: dict[str, str] = {}
# Any argument or flag is taken, so that the answer is always that the command is not built.
TAKES_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True}


def refuse(name: str) -> Callable[[typer.Context], int]:
    def command(ctx: typer.Context) -> int:
        raise UsageError(f"rlhfctl {name} is not built yet")

    return command
