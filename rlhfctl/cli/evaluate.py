"""eval: accuracy of a model or a run, with samples, votes, rankings and searches."""

from pathlib import Path
from typing import Annotated

import typer

from rlhfctl.cli.console import Console
from rlhfctl.cli.exit_codes import DONE
from rlhfctl.cli.options import JsonOption, QuietOption, VerboseOption
from rlhfctl.errors import Unable, UsageError

Text = str | None


def evaluate(
    ctx: typer.Context,
    source: Annotated[Text, typer.Argument(metavar="MODEL_OR_RUN", hidden=True)] = None,
    data: Annotated[Text, typer.Option(metavar="FILE", help="Prompts.  [run: data.eval]")] = None,
    verifier: Annotated[Text, typer.Option(metavar="NAME", help="What is right.  [run: its reward]")] = None,
    search: Annotated[str, typer.Option(metavar="HOW", help="greedy, sample, best-of-n or beam.")] = "greedy",
    n: Annotated[
        int | None, typer.Option("-n", metavar="N", min=1, help="Samples (8), beam width (4).")
    ] = None,
    value_model: Annotated[
        Text, typer.Option(metavar="DIR", help="Guides the search.  [run: its own]")
    ] = None,
    reward_model: Annotated[Text, typer.Option(metavar="DIR", help="Ranks in best-of-n.")] = None,
    alpha: Annotated[float | None, typer.Option(metavar="X", help="Weight of log pi in the score.")] = None,
    delimiter: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What ends a step.  [\\n]")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Steps of a beam (20).")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="Of samples.  [1]")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Longest answer.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="Of samples.")] = 0,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N rows.")] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="hf, vllm or vllm_server.")] = "hf",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Gets results.jsonl, eval.json.")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another results.jsonl, paired.")
    ] = None,
    save_trajectories: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Samples as rows for oreo and rm.")
    ] = None,
    balance: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="At most K right, K wrong a prompt.")
    ] = None,
    save_trees: Annotated[Path | None, typer.Option(metavar="FILE", help="All of a beam search.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Accuracy of a model or a run.

    \b
    Examples:
      rlhfctl eval runs/a --search sample -n 16 --out runs/a/eval
      rlhfctl eval models/m --data q.jsonl --verifier math_answer --json
      rlhfctl eval runs/a --search beam -n 4 --value-model runs/b/value_model
    """
    if source is None:
        raise UsageError("evaluate what? `rlhfctl eval MODEL_OR_RUN`")
    console: Console = ctx.obj
    from rlhfctl.cli.serve_rm import prepare_environment

    prepare_environment()
    try:
        from rlhfctl.evaluation import results, run, table
        from rlhfctl.evaluation.settings import Settings
    except ModuleNotFoundError as error:
        from rlhfctl.install import install_line

        raise Unable(f"rlhfctl eval needs {error.name}: {install_line('train')}") from None
    settings = Settings(
        source, data, verifier, search, n, value_model, reward_model, alpha, delimiter or [],
        max_steps, temperature, max_new_tokens, seed, limit, engine, out, compare,
        save_trajectories, balance, save_trees,
    )  # fmt: skip
    if engine.startswith("vllm"):
        refuse_heads(Path(source))
    result = run.evaluate(settings, console.note)
    console.finish(DONE, table.render(result), fields=results.summary(result))
    return DONE


def refuse_heads(place: Path) -> None:
    """What preflight says of a run that would sample with vLLM (X010), before anything is loaded."""
    from rlhfctl.preflight.devices import this_machine
    from rlhfctl.preflight.engine import heads_sentence, unrunnable_heads
    from rlhfctl.templates.files import read_json

    model = place / "final" if (place / "recipe.yaml").is_file() else place
    size = unrunnable_heads(read_json(model / "config.json") or {}, this_machine())
    if size is not None:
        raise Unable(f"{heads_sentence(size)}: use --engine hf")
