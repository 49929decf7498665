"""Start a run and tell how it ended. The run directory exists, holds recipe.yaml, and was checked by the caller."""

import io
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfctl.failure import Failure, first_failure, report_lines
from rlhfctl.launch.inline import run_inline
from rlhfctl.launch.plan import Plan, make_plan
from rlhfctl.launch.process import AgentResult, agent_root_cause, describe_exit, run_agent
from rlhfctl.launch.record import changes_since, read_launch, write_launch
from rlhfctl.launch.torchrun import torchrun_argv
from rlhfctl.preflight.devices import this_machine
from rlhfctl.preflight.nodes import Node, this_node
from rlhfctl.run_dir import RunDir

if TYPE_CHECKING:
    from rlhfctl.recipe.sections import Launch
    from rlhfctl.recipe.tasks import AnyRecipe


@dataclass(frozen=True, slots=True)
class Result:
    """state: done | failed | interrupted. report: lines for stderr, empty when done."""

    state: str
    exit_code: int
    step: int | None
    reason: str | None
    report: tuple[str, ...] = ()


def node_of(launch: "Launch") -> Node | None:
    """This node's place in a run over several, None for one node. The leader alone writes the run directory."""
    if launch.nnodes == 1 or launch.rdzv_endpoint is None:
        return None
    node = this_node(launch.rdzv_endpoint)
    return node if launch.node_rank is None else replace(node, leader=launch.node_rank == 0)


def start(recipe: "AnyRecipe", run: RunDir, resume: bool, verbose: bool, quiet: bool = False) -> Result:
    """Run the recipe in `run` to its end, in this process or under torchrun. quiet: no progress on stderr."""
    machine = this_machine()
    plan = make_plan(recipe.launch, machine, os.environ, node_of(recipe.launch))
    verbose = verbose or os.environ.get("RLHFCTL_DEBUG", "") not in ("", "0")
    if not plan.leader:
        return follow_leader(recipe, plan, run, resume)

    lock = run.acquire_lock()
    before = read_launch(run) if resume else {}
    attempt = run.next_attempt()
    for change in changes_since(before, plan):
        print(f"resuming with {change}: the numbers may differ in the last digits", file=sys.stderr)
    argv = worker_argv(recipe, plan, run, attempt, resume) if plan.launcher == "torchrun" else []
    run.write_status("running", attempt=attempt)
    write_launch(run, plan, machine, attempt, argv)
    try:
        if plan.launcher == "inline":
            exit_code = run_inline(plan, run, attempt, resume, quiet)
            return inline_result(recipe, run, attempt, exit_code, verbose)
        logs = run.attempt(attempt)
        progress = io.StringIO() if quiet else sys.stderr
        agent = run_agent(
            argv, worker_environment(plan), logs / "torchrun.log", logs / "console.log", progress, [lock]
        )
        return torchrun_result(recipe, plan, run, attempt, agent, verbose)
    finally:
        run.release_lock()


def follow_leader(recipe: "AnyRecipe", plan: Plan, run: RunDir, resume: bool) -> Result:
    """On the other nodes: only run the agent; rank 0's node numbers the attempt and writes the status."""
    logs = run.logs / f"node-{os.uname().nodename}-{os.getpid()}"
    logs.mkdir(parents=True, exist_ok=True)
    argv = worker_argv(recipe, plan, run, 0, resume, logs)
    agent = run_agent(
        argv, worker_environment(plan), logs / "torchrun.log", logs / "console.log", sys.stderr, []
    )
    if agent.signum is not None:
        return Result("interrupted", stop_code(agent.signum), None, "interrupted")
    if agent.returncode == 0:
        status = run.read_status()
        if status.get("state") == "interrupted":
            return Result("interrupted", status["exit_code"], status.get("step"), status.get("reason"))
        return Result("done", 0, status.get("step"), None)
    reason = "a worker failed; the first failure is told on the leader's node"
    return Result("failed", 1, None, reason, (f"{reason}; log: {logs / 'torchrun.log'}",))


def worker_argv(
    recipe: "AnyRecipe", plan: Plan, run: RunDir, attempt: int, resume: bool, logs: Path | None = None
) -> list[str]:
    program = ["rlhfctl.worker", str(run.path.absolute()), f"--attempt={attempt}", *["--resume"] * resume]
    directory = logs or run.attempt(attempt)
    return torchrun_argv(
        plan, f"rlhfctl-{recipe.name}", directory / "torchrun", recipe.launch.node_rank, program
    )


def worker_environment(plan: Plan) -> dict[str, str]:
    return {**os.environ, **plan.env, "RLHFCTL_LAUNCHER": str(os.getpid())}


# How it ended


def inline_result(recipe: "AnyRecipe", run: RunDir, attempt: int, exit_code: int, verbose: bool) -> Result:
    status = run.read_status()
    if exit_code == 0:
        return Result("done", 0, status.get("step"), None)
    if exit_code > 128:
        return interrupted(recipe, run, exit_code)
    failure = first_failure(run.attempt(attempt))
    if failure is None:  # even the error file could not be written
        failure = unknown_failure(run, attempt, 0, 1, status.get("reason") or "the run failed", exit_code)
    return failed(recipe, run, failure, verbose)


def torchrun_result(
    recipe: "AnyRecipe", plan: Plan, run: RunDir, attempt: int, agent: AgentResult, verbose: bool
) -> Result:
    """From the status that rank 0 wrote, the ranks' error files, and last torchrun's own words."""
    status = run.read_status()
    state = status.get("state")
    if agent.returncode == 0 and state == "done":
        return Result("done", 0, status.get("step"), None)
    if agent.signum is not None or (agent.returncode == 0 and state == "interrupted"):
        code = stop_code(agent.signum) if agent.signum is not None else int(status["exit_code"])
        if state != "interrupted":
            reason = "interrupted before a step boundary; the last checkpoint is kept"
            run.write_status("interrupted", reason=reason, exit_code=code, attempt=attempt)
        return interrupted(recipe, run, code)
    failure = first_failure(run.attempt(attempt))
    cause = agent_root_cause(run.attempt(attempt) / "torchrun.log")
    if failure is None or (cause is not None and cause[1] < 0 and cause[0] != failure.rank):
        # A rank that was killed leaves no file of its own, only peers that complain of having lost it.
        rank, code = cause or (0, agent.returncode)
        failure = unknown_failure(run, attempt, rank, plan.world, describe_exit(code), 1)
    run.write_status(
        "failed", reason=failure.sentence or failure.exception, exit_code=failure.exit_code, attempt=attempt
    )
    return failed(recipe, run, failure, verbose)


def unknown_failure(
    run: RunDir, attempt: int, rank: int, world: int, exception: str, exit_code: int
) -> Failure:
    log = run.attempt(attempt) / f"rank{rank}.log"
    if not log.exists():
        log = run.attempt(attempt) / "torchrun.log"
    return Failure(rank, world, exception, exit_code, str(log), 0.0)


def interrupted(recipe: "AnyRecipe", run: RunDir, exit_code: int) -> Result:
    status = run.read_status()
    reason = status.get("reason") or "interrupted"
    return Result("interrupted", exit_code, status.get("step"), reason, (reason,))


def failed(recipe: "AnyRecipe", run: RunDir, failure: Failure, verbose: bool) -> Result:
    reason = failure.sentence or failure.exception
    lines = tuple(report_lines(failure, recipe.task, run, verbose))
    return Result("failed", failure.exit_code, run.read_status().get("step"), reason, lines)


def stop_code(signum: int) -> int:
    """130 for Ctrl-C, 143 for SIGTERM and a lost terminal."""
    return 130 if signum == signal.SIGINT else 143
