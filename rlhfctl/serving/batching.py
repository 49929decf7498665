"""Requests of many clients, scored together.

Each worker is one thread with one scorer. It takes whatever waits, in the order it came, up to a budget of samples and
characters; a request is kept together unless it is larger than a batch. While a batch is scored the next one gathers.
A lone request is scored at once. After a batch of several, whose clients come again together, the next one waits until
as many requests are there, for a part of the time that the last one took: without that, clients that wait for their
answers fall into two groups that take turns, and a batch is half of what it could be. A request whose client has gone
before its turn is left out.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhfctl.rewards.outcome import Outcome

MAX_SAMPLES = 256
MAX_CHARACTERS = 1 << 18  # about 64k tokens; the model packs them exactly under its own token budget
MAX_WAITING = 1 << 16  # samples; past that a request is told to come again
PATIENCE = 0.3  # of the time that the last batch took
MAX_PATIENCE = 0.05  # seconds


class Full(Exception):
    """Too many samples wait already."""


class Scorer(Protocol):
    """What one worker scores with."""

    def score(self, requests: list[list[dict[str, Any]]]) -> list[list[Outcome]]:
        """Lists of samples to lists of outcomes, of the same lengths and in the same order."""
        ...

    def close(self) -> None:
        """Ends processes and frees memory."""
        ...


@dataclass(eq=False, slots=True)
class Job:
    """The samples of one request (of a large one: a part), and where their outcomes go."""

    samples: list[dict[str, Any]]
    characters: int
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[list[Outcome]]"
    cancelled: bool = field(default=False)


class Batcher:
    """submit() from an event loop; scoring in threads of its own, one for each scorer."""

    def __init__(
        self,
        scorers: list[Scorer],
        max_samples: int = MAX_SAMPLES,
        on_batch: Callable[[int], None] = lambda samples: None,
    ) -> None:
        """on_batch: told the size of each batch when it starts, from a worker's thread."""
        self.max_samples = max_samples
        self.waiting = 0  # samples
        self._on_batch = on_batch
        self._scorers = scorers
        self._jobs: deque[Job] = deque()
        self._enough = 1  # requests that a worker waits for
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, args=(scorer,), name=f"score-{place}", daemon=True)
            for place, scorer in enumerate(scorers)
        ]
        for thread in self._threads:
            thread.start()

    async def submit(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        """One outcome a sample, in order. Raises Full. A caller that is cancelled takes its samples back."""
        loop = asyncio.get_running_loop()
        jobs = []
        for start in range(0, len(samples), self.max_samples):
            part = samples[start : start + self.max_samples]
            jobs.append(Job(part, sum(map(characters, part)), loop, loop.create_future()))
        with self._changed:
            if self.waiting + len(samples) > MAX_WAITING:
                raise Full
            self._jobs.extend(jobs)
            self.waiting += len(samples)
            if len(self._jobs) >= self._enough:
                self._changed.notify(len(jobs))
        try:
            if len(jobs) == 1:
                return await jobs[0].done
            parts = await asyncio.gather(*(job.done for job in jobs))
        except asyncio.CancelledError:
            for job in jobs:
                job.cancelled = True
            raise
        return [outcome for part in parts for outcome in part]

    def close(self) -> None:
        """After what is being scored; what still waits is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)
        for scorer in self._scorers:
            scorer.close()

    def _work(self, scorer: Scorer) -> None:
        before, seconds = 0, 0.0
        while True:
            jobs = self._take(before, patience(seconds))
            if jobs is None:
                return
            before = len(jobs)
            if not jobs:  # all of them were cancelled
                continue
            started = time.perf_counter()
            self._on_batch(sum(len(job.samples) for job in jobs))
            try:
                outcomes = scorer.score([job.samples for job in jobs])
            except Exception as error:  # whatever breaks, each sample gets an answer and the thread lives on
                said = f"scoring failed: {type(error).__name__}: {error}"
                outcomes = [[Outcome("error", error=said) for _ in job.samples] for job in jobs]
            deliver(jobs, outcomes)
            seconds = time.perf_counter() - started

    def _take(self, before: int, patience: float) -> list[Job] | None:
        """The next batch: whole jobs up to the budget, one at least. None: closing.

        before: jobs of the last batch; for as many this one waits, for `patience` seconds."""
        with self._changed:
            while not self._jobs and not self._closing:
                self._changed.wait()
            if len(self._scorers) == 1 and len(self._jobs) < before and not self._closing:
                self._enough = before
                self._changed.wait(patience)
                self._enough = 1
            if self._closing:
                return None
            taken: list[Job] = []
            samples = size = 0
            while self._jobs:
                job = self._jobs[0]
                over = samples + len(job.samples) > self.max_samples or size + job.characters > MAX_CHARACTERS
                if taken and over:
                    break
                self._jobs.popleft()
                self.waiting -= len(job.samples)
                if not job.cancelled:
                    taken.append(job)
                    samples += len(job.samples)
                    size += job.characters
            return taken


def patience(seconds: float) -> float:
    """How long to wait for as many requests as the last batch had, which took `seconds`."""
    return min(PATIENCE * seconds, MAX_PATIENCE)


def deliver(jobs: list[Job], outcomes: list[list[Outcome]]) -> None:
    """Back to the event loops, in one call for each loop: a wake-up for every job would cost more than scoring it."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[Outcome]]]] = {}
    for job, given in zip(jobs, outcomes, strict=True):
        by_loop.setdefault(job.loop, []).append((job, given))
    for loop, pairs in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, pairs)


def settle(pairs: list[tuple[Job, list[Outcome]]]) -> None:
    for job, given in pairs:
        if not job.done.done():
            job.done.set_result(given)


def characters(sample: dict[str, Any]) -> int:
    return len(sample["response"]) + sum(len(str(m.get("content") or "")) for m in sample["messages"])
