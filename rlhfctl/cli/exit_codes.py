"""How a command ends: the exit code, and the `status` that `--json` gives for it. With 2 to 5 nothing was started."""

DONE = 0
FAILED = 1  # the run failed: a worker's error, or a bug
USAGE = 2  # the command line or the recipe is wrong
MISMATCH = 3  # a chat template finding of error level (with --strict a warning too)
UNABLE = 4  # this machine cannot run it: no GPU, a missing extra, a port in use, too little memory or disk
REFUSED = 5  # another preflight check: data, loss mask, reward, weights, shapes
INTERRUPTED = 130  # Ctrl-C; the checkpoint is kept
TERMINATED = 143  # SIGTERM; the checkpoint is kept

STATUS = {
    DONE: "ok",
    FAILED: "failed",
    USAGE: "invalid",
    MISMATCH: "mismatch",
    UNABLE: "unable",
    REFUSED: "refused",
    INTERRUPTED: "interrupted",
    TERMINATED: "interrupted",
}


def status_of(exit_code: int) -> str:
    return STATUS.get(exit_code, "failed")
