"""Start a run and tell how it ended. The run directory exists and was checked by the caller."""

import io
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfctl.errors import Interrupted
from rlhfctl.failure import Failure, first_failure, report_lines
from rlhfctl.launch.deepspeed import deepspeed_argv, killed_by
from rlhfctl.launch.hang import Watchdog, read_beats
from rlhfctl.launch.inline import run_inline
from rlhfctl.launch.inputs import hashes, refuse_other_inputs
from rlhfctl.launch.plan import Plan, make_plan
from rlhfctl.launch.process import (
    AgentResult,
    describe_exit,
    failed_meeting,
    killed_rank,
    noting_signals,
    run_agent,
)
from rlhfctl.launch.record import changes_since, read_launch, write_launch
from rlhfctl.launch.torchrun import torchrun_argv
from rlhfctl.preflight.devices import Machine, this_machine
from rlhfctl.preflight.hostfile import expanded
from rlhfctl.preflight.nodes import Node, this_node
from rlhfctl.recipe.load import dump
from rlhfctl.run_dir import RunDir, write_text
from rlhfctl.stop import StopRequest
from rlhfctl.stop import exit_code as stop_code
from rlhfctl.streams import write

if TYPE_CHECKING:
    from rlhfctl.recipe.sections import Launch
    from rlhfctl.recipe.tasks import AnyRecipe

MEETING_SECONDS = 120.0  # as long as torch's store waits for the ranks that are missing


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
    launch = expanded(launch)
    if launch.nnodes == 1 or launch.rdzv_endpoint is None:
        return None
    node = this_node(launch.rdzv_endpoint)
    return node if launch.node_rank is None else replace(node, leader=launch.node_rank == 0)


def start(recipe: "AnyRecipe", run: RunDir, resume: bool, verbose: bool, quiet: bool = False) -> Result:
    """Run the recipe in `run` to its end, in this process or under torchrun. quiet: no progress on stderr."""
    machine = this_machine()
    launch = expanded(recipe.launch)
    partitioned = recipe.deepspeed is not None and recipe.deepspeed.zero_stage > 0
    plan = make_plan(launch, machine, os.environ, node_of(launch), partitioned)
    verbose = verbose or os.environ.get("RLHFCTL_DEBUG", "") not in ("", "0")
    if not plan.leader:
        return follow_leader(recipe, plan, run, resume, quiet)

    lock = run.acquire_lock()
    try:
        if plan.launcher == "inline":
            return start_inline(recipe, plan, machine, run, resume, verbose, quiet)
        return start_torchrun(recipe, plan, machine, run, resume, verbose, quiet, lock)
    finally:
        run.release_lock()


def start_inline(
    recipe: "AnyRecipe", plan: Plan, machine: Machine, run: RunDir, resume: bool, verbose: bool, quiet: bool
) -> Result:
    stop = StopRequest(inline=True)
    attempt = 0
    with stop.installed():
        try:
            attempt = open_attempt(recipe, plan, machine, run, resume, [])
            code = run_inline(plan, run, attempt, resume, stop, quiet)
        except Interrupted as interruption:  # a signal before the worker was ready to answer it
            code = interruption.exit_code
            run.write_status("interrupted", reason=interruption.message, exit_code=code, attempt=attempt)
    return inline_result(recipe, run, attempt, code, verbose)


def start_torchrun(
    recipe: "AnyRecipe",
    plan: Plan,
    machine: Machine,
    run: RunDir,
    resume: bool,
    verbose: bool,
    quiet: bool,
    lock: int,
) -> Result:
    with noting_signals() as received:
        argv = launcher_argv(recipe, plan)
        attempt = open_attempt(recipe, plan, machine, run, resume, argv)
        logs = run.attempt(attempt)
        agent = run_agent(
            whole_command(argv, plan, logs, worker_program(run, attempt, resume)),
            worker_environment(plan),
            logs / "torchrun.log",
            logs / "console.log",
            io.StringIO() if quiet else sys.stderr,
            [lock],
            received,
            Watchdog(logs, node_name(plan), plan.timeout),
        )
        return torchrun_result(recipe, plan, run, attempt, agent, verbose)


def open_attempt(
    recipe: "AnyRecipe", plan: Plan, machine: Machine, run: RunDir, resume: bool, command: list[str]
) -> int:
    """Number the attempt and write down what is started; returns the number. Raises UsageError where the files that a
    resumed run reads are others than before: nothing is written then, or the next resume would take the recipe of this
    one for what has been trained."""
    before, now = read_launch(run) if resume else {}, hashes(recipe)
    mended = refuse_other_inputs(recipe, run, before.get("inputs", {}), now)
    write_text(run.recipe, dump(recipe))
    attempt = run.next_attempt()
    for function in mended:
        write(sys.stderr, f"resuming with another {function}: it rewards the steps from here on\n")
    for change in changes_since(before, plan):
        write(sys.stderr, f"resuming with {change}: the numbers may differ in the last digits\n")
    run.write_status("running", attempt=attempt)
    write_launch(run, plan, machine, attempt, command, now)
    return attempt


def follow_leader(recipe: "AnyRecipe", plan: Plan, run: RunDir, resume: bool, quiet: bool) -> Result:
    """On the other nodes: only run the agent; the leader numbers the attempt, and rank 0 (here, perhaps) writes the
    status."""
    logs = run.logs / f"node-{os.uname().nodename}-{os.getpid()}"
    logs.mkdir(parents=True, exist_ok=True)
    argv = launcher_argv(recipe, plan)
    with noting_signals() as received:
        # torchrun's agents wait for each other; DeepSpeed's start their workers, which read the recipe, at once.
        if plan.launcher == "deepspeed" and not leader_started(run, received):
            reason = f"the leader's node did not start the run within {MEETING_SECONDS:.0f} s"
            return Result("failed", 1, None, reason, (f"{reason}: start it, and this node again",))
        agent = run_agent(
            whole_command(argv, plan, logs, worker_program(run, 0, resume)),
            worker_environment(plan),
            logs / "torchrun.log",
            logs / "console.log",
            io.StringIO() if quiet else sys.stderr,
            [],
            received,
            Watchdog(run.logs / "latest", node_name(plan), plan.timeout),
        )
    if agent.signum is not None:
        return Result("interrupted", stop_code(agent.signum), None, "interrupted", ("interrupted",))
    status = run.read_status()
    if agent.returncode == 0 and status.get("state") == "interrupted":
        return interrupted(run, status["exit_code"])
    if agent.returncode == 0:
        return Result("done", 0, status.get("step"), None)
    log = logs / "torchrun.log"
    hang = agent.hang.sentence if agent.hang else None
    elsewhere = "a worker failed; the first failure is told on the leader's node"
    reason = hang or failed_meeting(log) or elsewhere
    return Result("failed", 1, None, reason, (f"{reason}; log: {log}",))


def leader_started(run: RunDir, received: list[int]) -> bool:
    """Wait until the leader has written the recipe and that it runs, or a signal arrives; False: not in time."""
    deadline = time.monotonic() + MEETING_SECONDS
    while not received and run.read_status().get("state") != "running":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def launcher_argv(recipe: "AnyRecipe", plan: Plan) -> list[str]:
    node_rank = expanded(recipe.launch).node_rank
    if plan.launcher == "deepspeed":
        return deepspeed_argv(plan, node_rank, os.environ)
    return torchrun_argv(plan, f"rlhfctl-{recipe.name}", node_rank)


def whole_command(argv: list[str], plan: Plan, logs: Path, program: list[str]) -> list[str]:
    """program: `-m MODULE ARGUMENT...`."""
    if plan.launcher == "deepspeed":
        return [*argv, *program[1:]]
    return [*argv, f"--log-dir={logs / 'torchrun'}", *program]


def worker_program(run: RunDir, attempt: int, resume: bool) -> list[str]:
    """What the launcher starts on every rank. attempt 0: the leader's ranks tell the number."""
    arguments = [str(run.path.absolute()), f"--attempt={attempt}", *["--resume"] * resume]
    return ["-m", "rlhfctl.worker", *arguments]


def worker_environment(plan: Plan) -> dict[str, str]:
    return {
        **os.environ,
        **plan.env,
        "RLHFCTL_LAUNCHER": str(os.getpid()),
        "RLHFCTL_NODE": node_name(plan),
    }


def node_name(plan: Plan) -> str:
    """What the ranks' records call this node: the address that faces the others, empty where it is the only one."""
    return (plan.node.address or "") if plan.node else ""


# How it ended


def inline_result(recipe: "AnyRecipe", run: RunDir, attempt: int, exit_code: int, verbose: bool) -> Result:
    status = run.read_status()
    if exit_code == 0:
        return Result("done", 0, status.get("step"), None)
    if exit_code > 128:
        return interrupted(run, exit_code)
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
        return interrupted(run, code)
    log = run.attempt(attempt) / "torchrun.log"
    failure, hang = first_failure(run.attempt(attempt)), agent.hang
    killed = killed_rank(log) if plan.launcher == "torchrun" else seen_killed(run, attempt, plan, agent)
    if hang is not None and (not hang.pids or (killed is not None and killed[2] in hang.pids)):
        rank = killed[0] if hang.pids and killed else hang.waits
        failure = unknown_failure(run, attempt, rank, plan.world, hang.sentence, 1)
    elif killed is not None:
        # It leaves no file of its own, only peers that complain of having lost it.
        failure = unknown_failure(run, attempt, killed[0], plan.world, describe_exit(killed[1]), 1)
    elif plan.launcher == "deepspeed" and (signalled := killed_by(log)) is not None:
        quiet = [rank for rank in range(plan.world) if ended_in_silence(run, attempt, rank)]
        failure = unknown_failure(run, attempt, (quiet or [0])[0], plan.world, describe_exit(signalled), 1)
    elif failure is None:
        # Rank 0 tells its reason in status.json too: on a full disk there is no error file.
        said = status.get("reason") if state == "failed" else None
        words = failed_meeting(log) or said or describe_exit(agent.returncode)
        failure = unknown_failure(run, attempt, 0, plan.world, words, 1)
    run.write_status(
        "failed", reason=failure.sentence or failure.exception, exit_code=failure.exit_code, attempt=attempt
    )
    return failed(recipe, run, failure, verbose)


def seen_killed(run: RunDir, attempt: int, plan: Plan, agent: AgentResult) -> tuple[int, int, int] | None:
    """(rank, exit code, pid) of the worker of this node that was first seen dead, where a signal ended it."""
    if agent.death is None or agent.death[1] >= 0:
        return None
    pid, code = agent.death
    here = [beat for beat in read_beats(run.attempt(attempt)) if beat.node == node_name(plan)]
    return next(((beat.rank, code, pid) for beat in here if beat.pid == pid), None)


def ended_in_silence(run: RunDir, attempt: int, rank: int) -> bool:
    """Whether a rank told nothing: the others end by the launcher's SIGTERM or by having lost it, and say so."""
    log = run.attempt(attempt) / f"rank{rank}.log"
    told = (run.attempt(attempt) / f"rank{rank}.error.json").exists()
    return not told and not (log.exists() and "Interrupted" in log.read_text(errors="replace")[-2000:])


def unknown_failure(
    run: RunDir, attempt: int, rank: int, world: int, exception: str, exit_code: int
) -> Failure:
    log = run.attempt(attempt) / f"rank{rank}.log"
    if not log.exists():
        log = run.attempt(attempt) / "torchrun.log"
    return Failure(rank, world, exception, exit_code, str(log), 0.0)


def interrupted(run: RunDir, exit_code: int) -> Result:
    status = run.read_status()
    reason = status.get("reason") or "interrupted"
    return Result("interrupted", exit_code, status.get("step"), reason, (reason,))


def failed(recipe: "AnyRecipe", run: RunDir, failure: Failure, verbose: bool) -> Result:
    reason = failure.sentence or failure.exception
    lines = tuple(report_lines(failure, recipe.task, run, verbose))
    return Result("failed", failure.exit_code, run.read_status().get("step"), reason, lines)
