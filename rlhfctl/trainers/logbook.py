"""One record per logged step: written to metrics.jsonl by rank 0 and shown as progress."""

import math
import resource
import time

from rlhfctl.errors import RunFailed
from rlhfctl.heartbeat import heartbeat
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.tracking.metrics import append_jsonl
from rlhfctl.tracking.progress import Progress
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.experience import Experience
from rlhfctl.trainers.token_table import token_table


class Logbook:
    def __init__(self, ctx: RunContext, total: int, start: int) -> None:
        self.ctx = ctx
        self.total = total
        self.progress: Progress | None = None
        if ctx.rank == 0:
            self.progress = Progress(total, start, ctx.say, course=ctx.recipe.tracking.sparkline)
        self.marks: dict[str, float] = {}
        self.cpu = time.process_time()
        self.wall = time.perf_counter()
        heartbeat.at("train", start + 1)

    def timed(self, name: str) -> "Stopwatch":
        """`with logbook.timed("rollout"):` adds to seconds/rollout of this step."""
        return Stopwatch(self.marks, name)

    def log(self, step: int, metrics: dict[str, float], force: bool = False) -> None:
        """Record step `step` (1-based: the number of steps done)."""
        heartbeat.at("train", step + 1)
        if not (force or step % self.ctx.recipe.train.log_every == 0 or step == self.total):
            return
        cpu = time.process_time()
        seconds = {f"seconds/{name}": value for name, value in self.marks.items()}
        seconds["seconds/cpu"] = cpu - self.cpu  # of this process and all its threads, since the last record
        seconds["seconds/step"] = time.perf_counter() - self.wall
        seconds["memory/peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.marks.clear()
        self.cpu, self.wall = cpu, time.perf_counter()
        if self.ctx.rank != 0:
            return
        phase = {"phase": self.ctx.phase.number} if self.ctx.phase else {}
        append_jsonl(self.ctx.run.metrics, {"step": step, **phase, **metrics, **seconds})
        if self.ctx.writers is not None:
            self.ctx.writers.log(step, {**phase, **metrics, **seconds})
        self.ctx.run.write_status("running", step, attempt=self.ctx.attempt)
        if self.progress:
            self.progress.update(step, metrics)

    def samples(self, step: int, experience: Experience, encoder: ChatEncoder) -> None:
        """Every train.samples_every steps the first few trajectories of the batch, whole, with their tokens."""
        train = self.ctx.recipe.train
        if self.ctx.rank == 0 and train.samples_every and step % train.samples_every == 0:
            for row, trajectory in enumerate(experience.trajectories[: train.samples_per_step]):
                record = trajectory.record(step, encoder) | {
                    "token_table": token_table(experience, row, encoder)
                }
                append_jsonl(self.ctx.run.samples, record)

    def close(self) -> None:
        if self.progress:
            self.progress.close()


class Stopwatch:
    def __init__(self, marks: dict[str, float], name: str) -> None:
        self.marks = marks
        self.name = name

    def __enter__(self) -> "Stopwatch":
        self.began = time.perf_counter()
        heartbeat.at(self.name)
        return self

    def __exit__(self, *_: object) -> None:
        self.marks[self.name] = self.marks.get(self.name, 0.0) + time.perf_counter() - self.began
        heartbeat.at("train")


def refuse_non_finite(step: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise RunFailed(
            f"{name} is {value} at step {step}: nothing of this step is saved; lower optim.lr or look at the batch"
        )
