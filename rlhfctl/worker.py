"""The process on every rank: read the resolved recipe, join the other ranks, run one trainer, tell how it ended.

`python -m rlhfctl.worker RUN_DIR --attempt N` under torchrun, or `run` in the launcher's own process. Nothing
heavy is imported before the signal handlers stand: Ctrl-C works from the first moment.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rlhfctl.collector import resting
from rlhfctl.errors import Interrupted, RlhfctlError, RunFailed, Unable, is_disk_full
from rlhfctl.failure import Failure, write_failure
from rlhfctl.heartbeat import heartbeat
from rlhfctl.run_dir import RunDir
from rlhfctl.stop import StopRequest
from rlhfctl.streams import write
from rlhfctl.tracking.progress import end_live_line

if TYPE_CHECKING:
    import torch

    from rlhfctl.recipe.tasks import AnyRecipe
    from rlhfctl.trainers.context import RunContext

TRAINERS = {
    "sft": "rlhfctl.trainers.sft",
    "rm": "rlhfctl.trainers.reward_model",
    "ppo": "rlhfctl.trainers.ppo",
    "reft": "rlhfctl.trainers.reft",
    "oreo": "rlhfctl.trainers.oreo_rounds",
}

# What CUDA and torch say where they do not fit each other or the GPU, and what it means.
CUDA_TROUBLE = {
    "driver version is insufficient": "the NVIDIA driver is older than the CUDA of this torch: update the driver, or "
    "install a torch built for an older CUDA",
    "NVIDIA driver on your system is too old": "the NVIDIA driver is older than the CUDA of this torch: update the "
    "driver, or install a torch built for an older CUDA",
    "no kernel image is available": "this torch has no kernels for this GPU: install a build for its "
    "compute capability",
    "Torch not compiled with CUDA enabled": "this torch is a CPU build: install a CUDA build to use the GPU",
    "Found no NVIDIA driver": "no NVIDIA driver is loaded: install it, or in a container start it with --gpus all",
}

GRACE = 60.0  # seconds past launch.timeout before a collective gives up by itself
PR_SET_PDEATHSIG = 1  # prctl: the kernel sends a signal when the parent dies


def run(
    run_dir: Path, resume: bool, attempt: int, inline: bool, stop: StopRequest, console: TextIO | None
) -> int:
    """Train on this rank and return the exit code; status.json (rank 0) and the rank's error file tell the rest.

    attempt 0: another node numbers the attempts, its ranks tell the number. console: where rank 0's lines for the
    user go besides the rank's log; None: the attempt's console file, which the launcher follows.
    """
    directory = RunDir(run_dir)
    rank = 0 if inline else int(os.environ["RANK"])
    world = 1 if inline else int(os.environ["WORLD_SIZE"])
    started = False
    log: TextIO = sys.stderr
    try:
        recipe = read_recipe(directory)
        resume = resume or left_by_a_restart(directory, inline)
        device = set_up_device(recipe)
        if not inline:
            join(recipe, device)
            if not attempt:  # it did not wait: a resume may have changed the recipe since it was read
                recipe = read_recipe(directory)
            attempt = agree_on(attempt)
        log = open_log(directory, attempt, rank, inline)
        heartbeat.open(directory.attempt(attempt) / f"rank{rank}.beat", rank)
        started = True
        say = speaker(directory, attempt, rank, log, console)
        if rank == 0:
            directory.write_status("running", attempt=attempt)
        choose_attention(recipe)
        train(make_context(recipe, directory, rank, world, device, resume, attempt, stop, say), inline)
        stop.deferred = True
        if rank == 0:
            directory.write_status("done", reached(directory), exit_code=0, attempt=attempt)
        leave(inline)
        return 0
    except BaseException as error:
        stop.deferred = True  # from here a signal changes nothing any more
        ending = explain(error, stop)
        if not started and attempt:
            with contextlib.suppress(OSError):
                log = open_log(directory, attempt, rank, inline)
        return conclude(directory, attempt, rank, world, ending, error, log, inline)


def conclude(
    directory: RunDir,
    attempt: int,
    rank: int,
    world: int,
    ending: RlhfctlError | None,
    error: BaseException,
    log: TextIO,
    inline: bool,
) -> int:
    """Write down how a run ended that did not reach its end; returns the exit code."""
    end_live_line()
    text = "".join(traceback.format_exception(error))
    write(log, f"{text}\n")
    if isinstance(ending, Interrupted):
        if rank == 0:
            with contextlib.suppress(OSError):
                directory.write_status(
                    "interrupted", reached(directory), ending.message, ending.exit_code, attempt=attempt
                )
        # 0 under torchrun: an interruption is no failure to restart from, and the launcher reads the status.
        return ending.exit_code if inline else 0
    exit_code = ending.exit_code if ending else 1
    exception = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    log_path = str(directory.attempt(attempt) / f"rank{rank}.log")
    failure = Failure(
        rank, world, exception, exit_code, log_path, time.time(), ending.message if ending else None, text
    )
    if attempt:
        write_failure(directory.attempt(attempt), failure)
    if rank == 0:
        with contextlib.suppress(OSError):
            reason = failure.sentence or failure.exception
            directory.write_status("failed", reached(directory), reason, exit_code, attempt=attempt)
    return exit_code


def reached(directory: RunDir) -> int | None:
    """The last step known: what the status says, or the newest checkpoint's where that is later."""
    newest = directory.newest_checkpoint()
    steps = [directory.read_status().get("step"), directory.checkpoint_step(newest) if newest else None]
    return max((step for step in steps if step is not None), default=None)


def explain(error: BaseException, stop: StopRequest) -> RlhfctlError | None:
    """The known failure that an exception stands for, or None for a bug."""
    if isinstance(error, RlhfctlError):
        return error
    if stop.signum is not None or isinstance(error, KeyboardInterrupt):
        # Once a stop is asked, a lost peer or a killed helper is its consequence.
        return Interrupted(stop.signum or signal.SIGINT, "interrupted; the last checkpoint is kept")
    less = (
        "lower train.tokens_per_microbatch or rollout.max_batch_tokens, or set policy.gradient_checkpointing"
    )
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return RunFailed(f"the GPU ran out of memory: {less}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return RunFailed(f"this machine ran out of memory: {less}")
    for sign, sentence in CUDA_TROUBLE.items():
        if sign in text:
            return Unable(f"{sentence}; `rlhfctl doctor` shows what is here")
    if is_disk_full(error):
        return RunFailed(f"the disk is full ({text.splitlines()[0]}): free some space, then add --resume")
    return None


# One step of `run` each


def read_recipe(directory: RunDir) -> "AnyRecipe":
    from rlhfctl.recipe.load import read_resolved

    return read_resolved(directory.recipe)


def left_by_a_restart(directory: RunDir, inline: bool) -> bool:
    """Whether a worker of this same launch already wrote here: then torchrun restarted it after a death.

    A new run starts in an unused directory, so what lies there is its own. TORCHELASTIC_RESTART_COUNT cannot
    tell: it differs between the nodes.
    """
    # Each of them may be the first to be written.
    logs = (directory.metrics, directory.samples, directory.quarantine)
    return not inline and (directory.newest_checkpoint() is not None or any(log.exists() for log in logs))


def set_up_device(recipe: "AnyRecipe") -> "torch.device":
    """The GPU of this local rank, else the CPU with the thread count of the environment."""
    from rlhfctl.models.heap import keep_large_blocks

    keep_large_blocks()
    import torch

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # transformers imports deepspeed where it is installed, and that warns where it must guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def choose_attention(recipe: "AnyRecipe") -> None:
    from rlhfctl.models.pack_attention import choose

    choose(recipe.policy.attention)


def join(recipe: "AnyRecipe", device: "torch.device") -> None:
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    # The launcher's own watch comes first: it can tell who hangs (launch/hang.py).
    timeout = timedelta(seconds=recipe.launch.timeout + GRACE)
    if device.type == "cuda":
        dist.init_process_group(backend, timeout=timeout, device_id=device)
    else:
        dist.init_process_group(backend, timeout=timeout)
    from rlhfctl.trainers.same_versions import refuse_other_versions

    refuse_other_versions()


def agree_on(attempt: int) -> int:
    """The number that the leader's workers were told, on every rank. Rank 0 may be another node's: torchrun numbers
    nodes in the order of their addresses as texts."""
    from rlhfctl.trainers.distributed import any_rank

    return any_rank(attempt)


def leave(inline: bool) -> None:
    import torch.distributed as dist

    if not inline and dist.is_initialized():
        dist.destroy_process_group()


def open_log(directory: RunDir, attempt: int, rank: int, inline: bool) -> TextIO:
    """logs/attempt_N/rankK.log. Under torchrun the process's own streams go there too, native code's included."""
    path = directory.attempt(attempt) / f"rank{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a", buffering=1)  # noqa: SIM115  open until the process ends
    if not inline:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        (directory.attempt(attempt) / f"rank{rank}.error.json").unlink(missing_ok=True)
    return log


def speaker(
    directory: RunDir, attempt: int, rank: int, log: TextIO, console: TextIO | None
) -> Callable[[str], None]:
    """The function that prints one line for the user (rank 0) and into the rank's log."""
    if rank == 0 and console is None:
        console = open(directory.attempt(attempt) / "console.log", "a", buffering=1)  # noqa: SIM115

    def say(line: str) -> None:
        print(line, file=log, flush=True)
        if rank == 0 and console is not None:
            end_live_line()
            write(console, f"{line}\n")

    return say


def make_context(
    recipe: "AnyRecipe",
    directory: RunDir,
    rank: int,
    world: int,
    device: "torch.device",
    resume: bool,
    attempt: int,
    stop: StopRequest,
    say: Callable[[str], None],
) -> "RunContext":
    from rlhfctl.trainers.context import RunContext

    return RunContext(recipe, directory, rank, world, device, resume, attempt, stop.asked, say)


def train(ctx: "RunContext", inline: bool) -> None:
    """Dispatch to the task's trainer; under torchrun an exception also goes into torchrun's own error file."""
    quiet_libraries()
    with resting():
        start = importlib.import_module(TRAINERS[ctx.recipe.task]).train
        importlib.import_module("transformers.models.auto.modeling_auto")
    gc.freeze()  # modules stay: nothing in them is looked at again
    if not inline:
        from torch.distributed.elastic.multiprocessing.errors import record

        start = record(start)
    with tracked(ctx):
        start(ctx)


@contextlib.contextmanager
def tracked(ctx: "RunContext") -> Iterator[None]:
    """The trackers of rank 0 open for the trainer, and closed however it ends."""
    from rlhfctl.tracking.writers import Writers

    if ctx.rank != 0:
        yield
        return
    ctx.writers = Writers(ctx.recipe, ctx.run, ctx.say)
    try:
        yield
    except BaseException as error:
        ctx.writers.close(getattr(error, "exit_code", 1))
        raise
    ctx.writers.close(0)


def leave_if_orphaned(launcher: str) -> None:
    """Die with the agent from here on, and end now where it died while we were starting."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        stat = Path(f"/proc/{os.getppid()}/stat").read_text()
        grandparent = stat.rsplit(")", 1)[1].split()[1]
    except (OSError, IndexError):
        grandparent = ""
    if grandparent != launcher:
        os._exit(1)


def quiet_libraries() -> None:
    """No progress bars of loading and saving: one line per logged step is what a user sees."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def main(argv: list[str]) -> int:
    """Entry under torchrun. The launcher's pid is in RLHFCTL_LAUNCHER: a worker does not outlive it."""
    stop = StopRequest(inline=False)
    with stop.installed():
        launcher = os.environ.get("RLHFCTL_LAUNCHER")
        if launcher:
            leave_if_orphaned(launcher)
        parser = argparse.ArgumentParser(prog="python -m rlhfctl.worker")
        parser.add_argument("run_dir", type=Path)
        parser.add_argument("--attempt", type=int, required=True)
        parser.add_argument("--resume", action="store_true")
        options = parser.parse_args(argv)
        return run(options.run_dir, options.resume, options.attempt, inline=False, stop=stop, console=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
