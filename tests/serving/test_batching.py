"""The queue between requests and scoring, with scorers that tell what they were given."""

import asyncio
import threading
import time
from typing import Any

import pytest

from rlhfctl.rewards.outcome import Outcome
from rlhfctl.serving import batching
from rlhfctl.serving.batching import Batcher, Full, Job

Samples = list[dict[str, Any]]


class Recorder:
    """Scores a sample with its number. The first batch waits for `go`, so that others gather behind it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.closed = False

    def score(self, requests: list[Samples]) -> list[list[Outcome]]:
        self.batches.append([len(request) for request in requests])
        assert self.go.wait(10)
        if any(sample["n"] < 0 for request in requests for sample in request):
            raise RuntimeError("a negative number")
        return [[Outcome("ok", float(sample["n"])) for sample in request] for request in requests]

    def close(self) -> None:
        self.closed = True


def numbered(*numbers: int) -> Samples:
    return [{"n": n, "messages": [], "response": "x"} for n in numbers]


async def behind(batcher: Batcher, recorder: Recorder, *requests: Samples) -> list[list[Outcome]]:
    """The first request is being scored when the others arrive."""
    tasks = [asyncio.create_task(batcher.submit(requests[0]))]
    while not recorder.batches:
        await asyncio.sleep(0.001)
    tasks += [asyncio.create_task(batcher.submit(request)) for request in requests[1:]]
    await asyncio.sleep(0.01)
    recorder.go.set()
    return list(await asyncio.gather(*tasks))


def test_what_waits_is_scored_together_and_everyone_gets_their_own() -> None:
    recorder = Recorder()
    sizes: list[int] = []
    batcher = Batcher([recorder], on_batch=sizes.append)
    answers = asyncio.run(
        behind(batcher, recorder, numbered(1), numbered(2, 3), numbered(4), numbered(5, 6, 7))
    )
    assert [[each.score for each in answer] for answer in answers] == [[1], [2, 3], [4], [5, 6, 7]]
    assert recorder.batches == [[1], [2, 1, 3]]
    assert sizes == [1, 6]
    batcher.close()
    assert recorder.closed


def test_a_batch_ends_before_a_request_that_does_not_fit_and_a_large_request_is_cut() -> None:
    recorder = Recorder()
    batcher = Batcher([recorder], max_samples=4)
    answers = asyncio.run(
        behind(batcher, recorder, numbered(0), numbered(1, 2, 3), numbered(4, 5), numbered(*range(6, 15)))
    )
    assert [each.score for answer in answers for each in answer] == list(range(15))
    assert recorder.batches == [[1], [3], [2], [4], [4], [1]]
    batcher.close()


def test_long_texts_fill_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_CHARACTERS", 2)
    recorder = Recorder()
    batcher = Batcher([recorder])
    asyncio.run(behind(batcher, recorder, *(numbered(n) for n in range(4))))
    assert recorder.batches == [[1], [1, 1], [1]]
    batcher.close()


def test_a_client_that_left_is_not_scored() -> None:
    recorder = Recorder()
    batcher = Batcher([recorder])

    async def run() -> list[Outcome]:
        first = asyncio.create_task(batcher.submit(numbered(1)))
        while not recorder.batches:
            await asyncio.sleep(0.001)
        gone, stays = (
            asyncio.create_task(batcher.submit(numbered(2))),
            asyncio.create_task(batcher.submit(numbered(3))),
        )
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        recorder.go.set()
        await first
        return await stays

    assert asyncio.run(run()) == [Outcome("ok", 3.0)]
    assert recorder.batches == [[1], [1]]
    assert batcher.waiting == 0
    batcher.close()


def test_a_scorer_that_raises_gives_errors_and_lives_on() -> None:
    recorder = Recorder()
    recorder.go.set()
    batcher = Batcher([recorder])

    async def run() -> list[list[Outcome]]:
        return [await batcher.submit(numbered(-1, 2)), await batcher.submit(numbered(3))]

    broken, fine = asyncio.run(run())
    assert [(each.status, each.score) for each in broken] == [("error", None)] * 2
    assert "RuntimeError: a negative number" in str(broken[0].error)
    assert fine == [Outcome("ok", 3.0)]
    batcher.close()


def test_too_many_waiting_samples_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_WAITING", 3)
    recorder = Recorder()
    batcher = Batcher([recorder])

    async def run() -> None:
        with pytest.raises(Full):
            await batcher.submit(numbered(1, 2, 3, 4))
        recorder.go.set()
        assert [each.score for each in await batcher.submit(numbered(1, 2, 3))] == [1.0, 2.0, 3.0]

    asyncio.run(run())
    batcher.close()


def test_a_batch_waits_for_a_part_of_what_the_last_one_took() -> None:
    assert batching.patience(0.01) == pytest.approx(0.003)
    assert batching.patience(60.0) == 0.05


@pytest.mark.parametrize(("scorers", "jobs", "before"), [(1, 2, 2), (1, 3, 2), (2, 1, 9), (1, 1, 0)])
def test_nobody_waits_where_enough_is_there_or_another_scorer_is_free(
    scorers: int, jobs: int, before: int
) -> None:
    batcher = Batcher([])
    batcher._scorers = [Recorder()] * scorers  # without their threads
    loop = asyncio.new_event_loop()
    batcher._jobs.extend(Job(numbered(n), 1, loop, loop.create_future()) for n in range(jobs))
    started = time.perf_counter()
    assert len(batcher._take(before, 20.0) or []) == jobs
    assert time.perf_counter() - started < 10
    loop.close()


def test_after_a_batch_of_several_the_next_waits_for_as_many_but_not_for_long() -> None:
    """Clients that ask again as soon as they are answered are scored together, not in two halves that take turns."""

    class Slow(Recorder):
        def score(self, requests: list[Samples]) -> list[list[Outcome]]:
            time.sleep(0.05)
            return super().score(requests)

    async def ask_twice(batcher: Batcher, n: int) -> None:
        await batcher.submit(numbered(n))
        await asyncio.sleep(0.001 * n)
        await batcher.submit(numbered(n))

    async def run(recorder: Recorder) -> float:
        batcher = Batcher([recorder])
        recorder.go.set()
        first = asyncio.create_task(batcher.submit(numbered(0)))
        await asyncio.sleep(0.02)
        await asyncio.gather(*(ask_twice(batcher, n) for n in range(1, 5)), first)
        started = time.perf_counter()
        await batcher.submit(numbered(9))  # alone, after a batch of four
        seconds = time.perf_counter() - started
        batcher.close()
        return seconds

    recorder = Slow()
    seconds = asyncio.run(run(recorder))
    assert [len(batch) for batch in recorder.batches] == [1, 4, 4, 1]
    assert seconds < 1
