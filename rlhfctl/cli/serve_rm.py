"""serve-rm: a reward model or a file of rules over HTTP."""

import os
from typing import Annotated, Literal

import typer

from rlhfctl.cli.console import Console
from rlhfctl.cli.exit_codes import DONE
from rlhfctl.cli.options import JsonOption, QuietOption, VerboseOption
from rlhfctl.errors import Unable, UsageError

MATCHES: dict[str, Literal["exact", "normalised", "fuzzy"]] = {
    "exact": "exact",
    "normalised": "normalised",
    "fuzzy": "fuzzy",
}


def serve_rm(
    ctx: typer.Context,
    source: Annotated[str | None, typer.Argument(metavar="MODEL_OR_RULES", hidden=True)] = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="0: any free one.", min=0, max=65535)] = 5000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the bearer token.")
    ] = None,
    max_batch: Annotated[int, typer.Option(metavar="N", help="Most samples scored together.", min=1)] = 256,
    engine: Annotated[str, typer.Option(metavar="NAME", help="What runs a model: plain or vllm.")] = "plain",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of a model: auto, float32 or bfloat16.")
    ] = "auto",
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows that /get_reward finds by their prompt.")
    ] = None,
    match: Annotated[
        str | None, typer.Option(metavar="HOW", help="exact, normalised or fuzzy; with --data.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Reward model or rules over HTTP.

    \b
    MODEL_OR_RULES  a reward model directory, or a python file with
                    score(samples), reward_func(...) or reward(...);
                    rules.py:NAME for another function
    stdout gets the address once it answers. SIGTERM ends it, after all that
    was asked before is answered.

    \b
    Examples:
      rlhfctl serve-rm models/rm
      rlhfctl serve-rm rules.py --port 5001
      RM_KEY=... rlhfctl serve-rm models/rm --host 0.0.0.0 --api-key-env RM_KEY
    """
    if source is None:
        raise UsageError("serve what? `rlhfctl serve-rm MODEL_OR_RULES`")
    if match is not None and (data is None or match not in MATCHES):
        raise UsageError(f"--match {match}: give {', '.join(MATCHES)}, and the rows with --data FILE")
    if engine not in ("plain", "vllm"):
        raise UsageError(f"--engine {engine}: give plain or vllm")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype}: give auto, float32 or bfloat16")
    key = api_key(api_key_env)
    prepare_environment()
    try:
        from rlhfctl.serving import matching, scorers, server
    except ModuleNotFoundError as error:
        from rlhfctl.install import install_line

        raise Unable(f"rlhfctl serve-rm needs {error.name}: {install_line('serve')}") from None
    if key is None and not server.is_loopback(host):
        raise UsageError(f"--host {host} is open to others: give a key with --api-key-env NAME")
    opened = server.bind(host, port)
    console: Console = ctx.obj
    with opened:
        rows = matching.Rows(data, MATCHES[match or "exact"]) if data is not None else None
        try:
            served = scorers.open_served(source, engine, dtype)
        except ModuleNotFoundError as error:
            from rlhfctl.install import install_line

            raise Unable(f"{source} needs {error.name}: {install_line('serve')}") from None
        address = f"http://{f'[{host}]' if ':' in host else host}:{opened.getsockname()[1]}"

        told = DONE

        def ready() -> bool:
            nonlocal told
            info = served.info.model_dump(by_alias=True, exclude={"template": {"text"}})
            console.note(f"serving {served.info.kind} {served.info.name}")
            told = console.finish(DONE, address, fields={"url": address, "info": info})
            return told == DONE  # nobody could ask where it is

        server.serve(served, opened, key, max_batch, ready, rows)
    return told


def prepare_environment() -> None:
    """Before torch is imported: libgomp reads its part once."""
    from rlhfctl.launch.plan import DEFAULTS
    from rlhfctl.preflight.devices import gpus

    # A model that loads reports bars and tables of its own; transformers imports deepspeed where it is installed.
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    if not gpus():
        quiet["DS_ACCELERATOR"] = "cpu"  # it warns where it must guess
    for name, value in {**DEFAULTS, **quiet}.items():
        os.environ.setdefault(name, value)


def api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(f"--api-key-env {variable}: that environment variable is not set or empty")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"--api-key-env {variable}: it holds characters that no HTTP header can carry; a key is plain ASCII"
        )
    return key
