"""Samples that are made inside a run, in pieces: what is kept of them, and what a resume makes again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfctl.errors import RunFailed
from rlhfctl.evaluation.answers import Answer
from rlhfctl.trainers import collect

ASKED: Any = [SimpleNamespace(ids=[1, index]) for index in range(5)]


def sampled(directory: Path, broken: set[int], allowed: int = 0) -> tuple[list[Answer], list[int]]:
    """The answers, and which requests were made. broken: requests whose judgement fails."""
    asked: list[int] = []

    def generate(requests: Any, sampling: Any) -> list[int]:
        asked.extend(request.index for request in requests)
        return [request.index for request in requests]

    def judge(prompts: Any, rollouts: list[int]) -> list[Answer]:
        return [
            Answer(f"\u2028{index}", [index], 1, False, 0.0, 1, failure="timeout: 60 s")
            if index in broken
            else Answer(f"\u2028{index}", [index], 1, False, 0.0, 1, correct=True, reward=1.0)
            for index in rollouts
        ]

    engine: Any = SimpleNamespace(generate=generate)
    answerer: Any = SimpleNamespace(engine=engine, sampling=lambda greedy, step: None)
    recipe = SimpleNamespace(reward=SimpleNamespace(max_failures=allowed))
    ctx: Any = SimpleNamespace(
        recipe=recipe, rank=0, world=1, say=lambda line: None, stop_signal=lambda: None
    )
    try:
        return collect.sampled(ctx, answerer, judge, ASKED, 7, directory, "round 1"), asked
    except RunFailed as failed:
        raise RunFailed(f"{failed.message} after {asked}") from failed


def test_failed_judgements_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends where rewards fail; with the cause mended its resume goes on, from the pieces before."""
    monkeypatch.setattr(collect, "PIECE", 2)
    with pytest.raises(
        RunFailed, match=r"1 samples could not be judged, 0 allowed.*; first: timeout: 60 s after"
    ):
        sampled(tmp_path / "pieces", {3})
    answers, asked = sampled(tmp_path / "pieces", set())
    assert asked == [2, 3, 4]
    assert [answer.ids for answer in answers] == [[0], [1], [2], [3], [4]]
    assert [answer.text for answer in answers] == [f"\u2028{index}" for index in range(5)]
    again, asked = sampled(tmp_path / "pieces", set())
    assert (again, asked) == (answers, [])


def test_allowed_failures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PIECE", 2)
    answers, _ = sampled(tmp_path / "pieces", {1}, allowed=1)
    assert [answer.correct for answer in answers] == [True, None, True, True, True]
    assert sampled(tmp_path / "pieces", set(), allowed=1) == (answers, [])
    with pytest.raises(RunFailed, match="1 samples could not be judged, 0 allowed"):
        sampled(tmp_path / "pieces", set())
