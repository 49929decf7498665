"""Which directory a run gets: a new one, or the one it continues in. Nothing is written here."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfctl.errors import UsageError
from rlhfctl.run_dir import RunDir, default_for, is_complete

if TYPE_CHECKING:
    from rlhfctl.recipe.tasks import AnyRecipe


def several_nodes(recipe: "AnyRecipe") -> bool:
    """By launch.nnodes or the lines of launch.hostfile. Raises UsageError for a hostfile that cannot be read."""
    if recipe.launch.hostfile is None:
        return recipe.launch.nnodes > 1
    from rlhfctl.preflight.hostfile import read_hosts

    return len(read_hosts(recipe.launch.hostfile)) > 1


def leads(recipe: "AnyRecipe") -> bool:
    """Whether this machine writes the run directory: of several nodes one does."""
    if not several_nodes(recipe):
        return True
    from rlhfctl.launch import node_of

    node = node_of(recipe.launch)
    return node is None or node.leader


def new_run(recipe: "AnyRecipe", run_dir: Path | None, claim: bool = False) -> RunDir:
    """An unused directory. claim: one that is not named is made at once, so that no other run chooses it.

    Raises UsageError where the one given is used.
    """
    if run_dir is None:
        if several_nodes(recipe):
            raise UsageError("a run over several nodes needs --run-dir: one directory that all of them see")
        run = RunDir(default_for(recipe.name))
        while claim and not run.claim():
            run = RunDir(default_for(recipe.name))
        return run
    run = RunDir(run_dir)
    if run_dir.is_file():
        raise UsageError(f"{run_dir} is a file: give --run-dir a directory")
    refuse_used(recipe, run)
    return run


def refuse_used(recipe: "AnyRecipe", run: RunDir) -> None:
    """Raises UsageError, with the ways out, where a new run would mix with what the directory holds."""
    # Of several nodes one may be there before the leader: its logs are no earlier run.
    taken = run.recipe.exists() if several_nodes(recipe) else run.is_used()
    if taken and leads(recipe):
        raise UsageError(used(run))


def used(run: RunDir) -> str:
    """One sentence with the ways out."""
    directory = shlex.quote(str(run.path))
    if not run.recipe.exists():
        return f"{directory} is not empty and holds no run: give another --run-dir"
    return (
        f"{directory} holds a run already ({progress(run)}): continue it with --resume, "
        "give another --run-dir, or remove it"
    )


def run_to_resume(run_dir: Path | None, name: str | None) -> RunDir:
    """The run that --resume continues. Raises UsageError where there is none to continue."""
    if run_dir is None:
        newest = newest_run(name)
        hint = f" (the newest run of {name} is {newest})" if newest else ""
        raise UsageError(f"--resume needs --run-dir DIR, the run to continue{hint}")
    run = RunDir(run_dir)
    if run.recipe.is_file():
        return run
    if run_dir.exists() and run.is_used():
        raise UsageError(f"{run_dir} holds no run to continue: it has no recipe.yaml")
    raise UsageError(f"there is no run in {run_dir} to continue: start it without --resume")


def newest_run(name: str | None) -> Path | None:
    """The last of runs/NAME/DATE: the names sort by date."""
    found = [path.parent for path in Path("runs").glob(f"{name}/*/recipe.yaml")] if name else []
    return max(found, default=None)


def progress(run: RunDir) -> str:
    """`done at step 120`, `interrupted at step 40`."""
    status = run.read_status()
    state = status.get("state") or "never started"
    if state == "running":
        state = "running, or killed"
    return state if status.get("step") is None else f"{state} at step {status['step']}"


def check_changes(run: RunDir, before: "AnyRecipe", after: "AnyRecipe") -> dict[str, str]:
    """The keys a resume changes, with `old -> new`. Raises UsageError where one may not change."""
    from rlhfctl.recipe.changes import changes, may_change

    differ = changes(before, after)
    refused = [f"{key} ({change})" for key, change in differ.items() if not may_change(key)]
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise UsageError(
            f"--resume would change what the run in {run.path} trains: {', '.join(refused[:5])}{more}; "
            f"resume it as it is (rlhfctl {before.task} --resume --run-dir {shlex.quote(str(run.path))}), "
            "or start a new run in another --run-dir"
        )
    if "train.steps" in differ and getattr(after, "value_fit", None) is not None and is_complete(run.final):
        # Refused here, before recipe.yaml says what was not trained: the run stays as it ended.
        raise UsageError(
            f"{run.path} has fitted a value to its final policy: for train.steps {after.train.steps} start a new run"
        )
    reached, first = where_it_is(run)
    if after.train.steps is not None and "train.steps" in differ and after.train.steps < reached - first:
        phase = f", {reached - first} of its phase" if first else ""
        raise UsageError(
            f"train.steps={after.train.steps}: the run in {run.path} is at step {reached} already{phase}"
        )
    epochs, fewer = before.train.epochs, after.train.epochs
    if epochs and fewer and fewer < epochs and run.read_status().get("state") == "done":
        raise UsageError(
            f"train.epochs={fewer}: the run in {run.path} has passed its data {epochs} times already"
        )
    return differ


def where_it_is(run: RunDir) -> tuple[int, int]:
    """The step of the newest checkpoint, and the one that its phase began at: train.steps counts those of one phase."""
    newest = run.newest_checkpoint()
    reached = run.checkpoint_step(newest) if newest else 0
    ends = [0]
    for model in (run.warmup, *run.path.glob("rounds/*/policy")):
        if is_complete(model):
            ends.append(int(json.loads((model / "phase.json").read_text())["step"]))
    return reached, max(end for end in ends if end <= reached)
