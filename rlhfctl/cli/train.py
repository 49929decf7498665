"""sft, rm, ppo, reft, oreo: five names, one body. What was checked is what runs: the resolved recipe."""

import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rlhfctl.cli.console import Console
from rlhfctl.cli.exit_codes import DONE
from rlhfctl.cli.options import (
    DryRunOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    RecipeArgument,
    ResumeOption,
    RunDirOption,
    VerboseOption,
)
from rlhfctl.errors import UsageError

if TYPE_CHECKING:
    from rlhfctl.preflight.run import Report
    from rlhfctl.recipe.load import Loaded
    from rlhfctl.run_dir import RunDir

LONGER = {"train.steps", "train.epochs"}


HELP = """{summary}

\b
RECIPE     a path, - for stdin, or a shipped name (rlhfctl recipes)
KEY=VALUE  a change of a recipe key: optim.lr=1e-5 data.train.0.path=f.jsonl

\b
Examples:
  {examples}
"""


def command(task: str, summary: str, *examples: str) -> Callable[..., int]:
    """The command of one task; its docstring is its help."""

    def run(
        ctx: typer.Context,
        recipe: RecipeArgument = None,
        overrides: OverridesArgument = None,
        run_dir: RunDirOption = None,
        resume: ResumeOption = False,
        dry_run: DryRunOption = False,
        json: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> int:
        return train(ctx.obj, task, recipe, overrides or [], run_dir, resume, dry_run)

    run.__doc__ = HELP.format(
        summary=summary, examples="\n  ".join(f"rlhfctl {task} {each}" for each in examples)
    )
    return run


sft = command(
    "sft",
    "Supervised fine-tuning on prompts and responses.",
    "quickstart/sft",
    "my.yaml optim.lr=2e-5 train.epochs=2 --run-dir runs/a",
    "my.yaml --dry-run > resolved.yaml",
    "--resume --run-dir runs/a",
)
rm = command(
    "rm",
    "Reward model from pairs, right or wrong answers, or steps.",
    "quickstart/rm policy.path=runs/a/final",
    "my.yaml algorithm.objective=outcome",
    "my.yaml --dry-run --json",
    "--resume --run-dir runs/c",
)
ppo = command(
    "ppo",
    "Reinforcement learning from rewards (PPO, GRPO, RLOO).",
    "quickstart/ppo policy.path=runs/a/final",
    "my.yaml algorithm.kl_coef=0.02 rollout.n=4",
    "my.yaml --dry-run --json",
    "--resume --run-dir runs/b",
)
reft = command(
    "reft",
    "Supervised warm-up, then PPO on the same questions (ReFT).",
    "quickstart/reft",
    "my.yaml warmup.epochs=2 algorithm.kl_coef=0.01",
    "my.yaml --dry-run --json",
    "--resume --run-dir runs/e",
)
oreo = command(
    "oreo",
    "Offline reasoning optimisation from scored answers.",
    "my.yaml policy.path=runs/a/final",
    "my.yaml algorithm.level=step algorithm.beta=0.05",
    "my.yaml --dry-run --json",
    "--resume --run-dir runs/d",
)


def train(
    console: Console,
    task: str,
    source: str | None,
    overrides: list[str],
    run_dir: Path | None,
    resume: bool,
    dry_run: bool,
) -> int:
    """Load, choose the directory, check, and start; returns the exit code of the command."""
    from rlhfctl.cli.run_rules import leads, new_run
    from rlhfctl.processor import matmul_choice
    from rlhfctl.recipe.load import load_recipe

    matmul_choice()
    if resume:
        loaded, run, changed = resumed(task, source, overrides, run_dir)
    elif source is None:
        raise UsageError(
            f"which recipe? `rlhfctl {task} RECIPE`; `rlhfctl recipes` lists those that are shipped"
        )
    else:
        loaded, changed = load_recipe(source, overrides, task), {}
        run = new_run(loaded.recipe, run_dir, claim=not dry_run)
    leader = leads(loaded.recipe)

    if resume and run.read_status().get("state") == "done" and not LONGER & set(changed):
        return already_done(console, run)
    if not dry_run or run_dir is not None:
        console.note(f"run directory: {run.path}")
    for key, change in changed.items():
        console.note(f"changed: {key} {change}")

    from rlhfctl.preflight.run import run_preflight  # not before: a wrong key is told without its imports

    try:
        report = run_preflight(loaded, run_dir=run.path)
    except BaseException:
        if run_dir is None and not dry_run:
            run.give_back()
        raise
    console.report(report)
    if dry_run:
        return dry(console, loaded, run if run_dir else None, report, resume)
    if leader:
        hold(loaded, run, resume, refused=report.exit_code != 0)
        keep_report(run, report)
    if report.exit_code:
        run.release_lock()
        return console.finish(report.exit_code, message=refusal(report), fields=told(run, report))
    return start_and_tell(console, loaded, run, report, resume)


def hold(loaded: "Loaded", run: "RunDir", resume: bool, refused: bool) -> None:
    """Lock the directory before the first write into it: two commands may have chosen the same one. A new run that is
    refused leaves its report there, and no lock."""
    from rlhfctl.cli.run_rules import refuse_used

    run.create()
    if resume or not refused:
        run.acquire_lock()
    if not resume:
        refuse_used(loaded.recipe, run)  # the other one may have run to its end since this one looked


def start_and_tell(console: Console, loaded: "Loaded", run: "RunDir", report: "Report", resume: bool) -> int:
    from rlhfctl.launch import start

    result = start(loaded.recipe, run, resume, console.verbose, console.quiet)
    for signum in (signal.SIGINT, signal.SIGTERM):  # it has ended: how is told now, undisturbed
        signal.signal(signum, signal.SIG_IGN)
    for line in result.report:
        console.error(line)
    if result.exit_code == DONE:
        console.note(f"done at step {result.step}: {run.final}")
    ending = {"state": result.state, "step": result.step, "reason": result.reason}
    return console.finish(result.exit_code, str(run.path), fields={**told(run, report), **ending})


def resumed(
    task: str, source: str | None, overrides: list[str], run_dir: Path | None
) -> tuple["Loaded", "RunDir", dict[str, str]]:
    """The recipe a run is continued with: its own, or the one given where it changes nothing that was trained."""
    from rlhfctl.cli.run_rules import check_changes, run_to_resume
    from rlhfctl.recipe.load import load_recipe, read_resolved

    if source is not None and "=" in source and not os.path.exists(source):
        overrides, source = [source, *overrides], None  # `--resume --run-dir DIR train.steps=200`
    given = None if source is None else load_recipe(source, overrides, task)
    run = run_to_resume(run_dir, given.recipe.name if given else None)
    before = read_resolved(run.recipe)
    if before.task != task:
        again = f"rlhfctl {before.task} --resume --run-dir {shlex.quote(str(run.path))}"
        raise UsageError(f"{run.path} is a run of {before.task}, not of {task}: `{again}`")
    loaded = given or load_recipe(str(run.recipe), overrides, task)
    return loaded, run, check_changes(run, before, loaded.recipe)


def already_done(console: Console, run: "RunDir") -> int:
    step = run.read_status().get("step")
    console.note(f"{run.path} is done at step {step}: a larger train.steps would continue it")
    fields: dict[str, Any] = {"run_dir": str(run.path), "state": "done", "step": step, "findings": []}
    return console.finish(DONE, str(run.path), fields=fields)


def dry(console: Console, loaded: "Loaded", run: "RunDir | None", report: "Report", resume: bool) -> int:
    """The resolved recipe, and the report where a directory for it was named."""
    from rlhfctl.recipe.load import dump

    if run is not None and not resume:
        keep_report(run, report)
    message = refusal(report) if report.exit_code else None
    fields = {**told(run, report), "recipe": loaded.recipe.model_dump(mode="json")}
    return console.finish(report.exit_code, dump(loaded.recipe), message, fields)


def told(run: "RunDir | None", report: "Report") -> dict[str, Any]:
    return {"run_dir": str(run.path) if run else None, "findings": report.as_dict()["findings"]}


def keep_report(run: "RunDir", report: "Report") -> None:
    import json

    from rlhfctl.run_dir import write_text

    run.create()
    write_text(run.preflight, json.dumps(report.as_dict(), indent=1) + "\n")


def refusal(report: "Report") -> str:
    errors = [finding for finding in report.findings if finding.severity == "error" and not finding.handled]
    return f"not started: {errors[0].title}" + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")
