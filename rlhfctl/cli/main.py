"""The command line. At import: the standard library and typer, nothing else (tests hold this and the CPU time)."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from rlhfctl.cli.console import Console
from rlhfctl.cli.doctor import doctor
from rlhfctl.cli.evaluate import evaluate
from rlhfctl.cli.exit_codes import DONE, FAILED, INTERRUPTED, TERMINATED, UNABLE, USAGE
from rlhfctl.cli.inspect_template import inspect_template
from rlhfctl.cli.options import PATHS_OF
from rlhfctl.cli.recipes import recipes
from rlhfctl.cli.report import report
from rlhfctl.cli.serve_rm import serve_rm
from rlhfctl.cli.train import oreo, ppo, reft, rm, sft
from rlhfctl.errors import RlhfctlError, closed_path, impossible_path, is_disk_full
from rlhfctl.streams import give_up, write

SECTIONS = {
    "Train": ("sft", "rm", "ppo", "reft", "oreo"),
    "Check and measure": ("inspect-template", "eval", "report"),
    "Serve": ("serve-rm",),
    "Look around": ("recipes", "doctor"),
}
COMMANDS: dict[str, Callable[..., int]] = {
    "sft": sft,
    "rm": rm,
    "ppo": ppo,
    "reft": reft,
    "oreo": oreo,
    "inspect-template": inspect_template,
    "eval": evaluate,
    "recipes": recipes,
    "serve-rm": serve_rm,
    "doctor": doctor,
    "report": report,
}
COMPLETE = "_RLHFCTL_COMPLETE"


class Command(TyperCommand):
    """Its flags reach the console as they were parsed: short ones may stand together (-nq)."""

    def invoke(self, ctx: Any) -> Any:
        console: Console = ctx.obj
        console.began = True
        console.json, console.quiet = ctx.params["json"], ctx.params["quiet"]
        console.verbose |= ctx.params["verbose"]
        if console.verbose:
            os.environ["RLHFCTL_DEBUG"] = "1"
        for param in self.params:  # no shell expands the ~ of --run-dir=~/a
            given = ctx.params.get(param.name or "")
            if param.metavar in PATHS_OF and str(given).startswith("~"):
                ctx.params[param.name or ""] = type(given)(os.path.expanduser(str(given)))
        return super().invoke(ctx)


class Sections(TyperGroup):
    """Help with the commands in sections, without rich."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(len(name) for name in self.commands)
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name.ljust(width), self.commands[name].get_short_help_str(60)) for name in names]
                )


app = typer.Typer(
    cls=Sections,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    if wanted:
        from rlhfctl import __version__

        typer.echo(f"rlhfctl {__version__}")
        raise typer.Exit


def show_completion(shell: str | None) -> None:
    if shell is not None:
        from rlhfctl.cli.scripts import completion_script

        typer.echo(completion_script(shell), nl=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    completion: Annotated[
        str | None,
        typer.Option(
            metavar="SHELL",
            callback=show_completion,
            is_eager=True,
            help="Print the script for bash, zsh or fish.",
        ),
    ] = None,
) -> None:
    """RLHF post-training that refuses to start a run that would silently train wrong.

    \b
    Examples:
      rlhfctl recipes
      rlhfctl ppo quickstart/ppo --dry-run
      rlhfctl ppo quickstart/ppo optim.lr=1e-4 --run-dir runs/a
      rlhfctl ppo --resume --run-dir runs/a

    \b
    Exit codes: 0 done, 1 the run failed, 2 command line or recipe wrong,
    3 chat template mismatch, 4 this machine cannot run it, 5 refused by
    another check, 130 / 143 interrupted with a checkpoint.
    """


def add_commands() -> None:
    """In the order of SECTIONS."""
    for name in (name for names in SECTIONS.values() for name in names):
        app.command(name, cls=Command)(COMMANDS[name])


add_commands()


def run(argv: list[str]) -> int:
    """One command line to its exit code. Every way it can end prints what the contract says, once."""
    debug = os.environ.get("RLHFCTL_DEBUG", "") not in ("", "0")
    before_rest = argv[: argv.index("--")] if "--" in argv else argv
    console = Console("--json" in before_rest, verbose=debug)  # until the command is parsed
    if (sentence := empty_argument(argv)) is not None:
        return console.finish(USAGE, message=sentence)
    received: list[int] = []

    def terminate(signum: int, frame: FrameType | None) -> None:
        """As a Ctrl-C: whatever catches errors on the way, a check for one, lets it through."""
        received.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = get_command(app).main(
            args=argv or ["--help"], prog_name="rlhfctl", standalone_mode=False, obj=console
        )
        if code == INTERRUPTED and not console.finished:  # typer makes this of a KeyboardInterrupt
            code = TERMINATED if received else INTERRUPTED
            trains = next(iter(argv), "") in SECTIONS["Train"]
            before = "anything was started" if trains else "there was a result"
            return console.finish(code, message=f"interrupted before {before}")
        return code or DONE
    except RlhfctlError as error:
        show_traceback(console)
        problems = [problem.as_dict() for problem in getattr(error, "problems", [])]
        return console.finish(error.exit_code, message=error.message, fields={"errors": problems})
    except SystemExit as error:  # typer's answer to any broken pipe
        if not console.began:  # a reader of the help that went away
            give_up(sys.stdout)
            return DONE
        return console.finish(FAILED, message=bug(error.__context__ or error))
    except typer.TyperException as error:
        return console.finish(USAGE, message=usage_message(error, argv))
    except Exception as error:
        show_traceback(console)
        if (full := disk_full(error)) is not None:
            return console.finish(UNABLE, message=full)
        if (sentence := impossible_path(error) or closed_path(error)) is not None:
            return console.finish(USAGE, message=sentence)
        return console.finish(FAILED, message=bug(error))


def bug(error: BaseException) -> str:
    return f"a bug in rlhfctl: {type(error).__name__}: {error} (-v shows the traceback)"


def empty_argument(argv: list[str]) -> str | None:
    """The sentence for an argument of no characters: as a path it would mean the current directory."""
    for before, word in zip(["rlhfctl", *argv], argv, strict=False):
        place = before if not word else word.removesuffix("=")
        if not word or (word.startswith("--") and word.endswith("=")):
            return f"the argument after {place} is empty: give it a value, or leave it out"
    return None


def usage_message(error: typer.TyperException, argv: list[str]) -> str:
    """The parser's sentence and where to read on."""
    first = next((word for word in argv if not word.startswith("-")), None)
    command = first if any(first in names for names in SECTIONS.values()) else None
    said = error.format_message().rstrip(".")
    return f"{said} (rlhfctl {f'{command} ' if command else ''}--help)"


def disk_full(error: Exception) -> str | None:
    """The sentence for a write that found no space; None for any other error."""
    if not is_disk_full(error):
        return None
    said = str(error).strip().splitlines()[0]
    return f"the disk is full ({said}): free some space, then give the same command again"


def show_traceback(console: Console) -> None:
    if console.verbose:
        import traceback

        console.error(traceback.format_exc().rstrip())


def main() -> None:
    if COMPLETE in os.environ:
        from rlhfctl.cli.complete import complete

        sys.exit(complete(get_command(app), os.environ[COMPLETE], sys.argv[1:]))
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said: a late Ctrl-C must not end it otherwise
    write(sys.stderr, "")  # what a library left there for a reader who has gone would end it otherwise, too
    sys.exit(code)
