"""Which states a search has valued, and which log-probabilities count, where an engine writes past a delimiter."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from rlhfctl.data.encode import PromptRow
from rlhfctl.data.samples import Sample
from rlhfctl.evaluation.answers import Answer
from rlhfctl.evaluation.guided import _best_of_n, _read_states, _reward_scores, value_of
from rlhfctl.evaluation.run import Row
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rollout.delimiters import Delimiters
from rlhfctl.rollout.types import Request, Rollout, Sampling, refuse_too_long
from rlhfctl.search.beam import Beam, beam_search

STOP, NEWLINE = 9, 8
DELIMITERS = Delimiters(["\n"], lambda ids: "".join({NEWLINE: "\n", STOP: ""}.get(i, str(i)) for i in ids))


class Written:
    """An engine whose answers are fixed, one list a step, and that knows nothing of delimiters."""

    def __init__(self, steps: Sequence[Sequence[tuple[list[int], list[float]]]]) -> None:
        self.steps = iter(steps)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        return [
            Rollout(request.index, request.prompt_ids, ids, torch.tensor(logprobs), "stop")
            for request, (ids, logprobs) in zip(requests, next(self.steps), strict=True)
        ]


class Recorder:
    """V of a state is the number of its tokens; what was asked is kept."""

    facts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.places: list[list[int]] = []
        self.prompts: list[int] = []

    def at(
        self,
        rows: Sequence[list[int]],
        places: Sequence[Sequence[int]],
        budget: int,
        prompts: Sequence[int],
    ) -> list[list[float]]:
        self.rows += rows
        self.places += [list(each) for each in places]
        self.prompts += prompts
        return [[float(len(row)) for _ in each] for row, each in zip(rows, places, strict=True)]


def test_a_step_ends_at_its_delimiter_and_a_state_before_the_stop_token() -> None:
    first = [([1, NEWLINE, 2, STOP], [-0.5, -0.25, -8.0, -8.0]), ([STOP], [-2.0])]
    second = [([3, STOP], [-1.0, -0.125]), ([4, 5, STOP], [-1.0, -1.0, -1.0])]
    model = Recorder()
    (tree,) = beam_search(
        Written([first, second]),  # type: ignore[arg-type]
        [[6, 7]],
        value_of(model, [[6, 7]], (STOP,)),  # type: ignore[arg-type]
        Beam(2, 4, 1.0),
        Sampling(40, 1.0, 1.0, (STOP,), 0, 0, 8192),
        DELIMITERS,
    )
    assert model.rows == [[6, 7, 1, NEWLINE], [6, 7], [6, 7, 1, NEWLINE, 3], [6, 7, 1, NEWLINE, 4, 5]]
    assert model.places == [[len(row) - 1] for row in model.rows]
    assert model.prompts == [2] * 4
    assert [each.ids for each in tree.candidates] == [
        [1, NEWLINE],
        [STOP],
        [1, NEWLINE, 3, STOP],
        [1, NEWLINE, 4, 5, STOP],
    ]
    logprobs = [-0.75, -2.0, -1.875, -3.75]
    assert [each.logprob for each in tree.candidates] == pytest.approx(logprobs)
    assert [each.score for each in tree.candidates] == pytest.approx([3.25, 0.0, 3.125, 2.25])
    assert tree.chosen == 2


def test_no_more_is_asked_for_than_an_answer_may_still_hold() -> None:
    """States of one depth differ in length: the room of the shortest is more than the context leaves the longest."""
    asked: list[Request] = []

    class Asked(Written):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
            refuse_too_long(requests, sampling, 3 + 10)  # prompt and the longest answer: the context
            asked.extend(requests)
            return super().generate(requests, sampling)

    first = [([1, 1, 1, NEWLINE], [-1.0] * 4), ([2, NEWLINE], [-1.0] * 2)]
    second = [([3, STOP], [-1.0] * 2)] * 4
    beam_search(
        Asked([first, second]),  # type: ignore[arg-type]
        [[5, 6, 7]], lambda made: [0.0] * len(made), Beam(2, 2, 0.0),
        Sampling(10, 1.0, 1.0, (STOP,), 0, 0, 4096), DELIMITERS,
    )  # fmt: skip
    assert [each.room(10) for each in asked] == [10, 10, 6, 6, 8, 8]


def test_answers_are_valued_at_their_steps_and_before_the_stop_token() -> None:
    row = SimpleNamespace(prompt=SimpleNamespace(ids=[6, 7]), states=[])
    answers = [
        Answer("", ids, len(ids), truncated, 0.0, 1)
        for ids, truncated in (
            ([1, NEWLINE, 2, STOP], False),
            ([STOP], False),
            ([1, NEWLINE, STOP], False),
            ([1, 2], True),
        )
    ]
    model = Recorder()
    _read_states(model, SimpleNamespace(delimiters=DELIMITERS), [(row, answer) for answer in answers])  # type: ignore[arg-type]
    assert model.rows == [[6, 7, 1, NEWLINE, 2], [6, 7], [6, 7, 1, NEWLINE], [6, 7, 1, 2]]
    assert model.places == [[3, 4], [1], [3], [3]]


def test_samples_that_a_reward_model_cannot_score_are_told() -> None:
    """The others compete; of a prompt without any score the first sample stands."""
    sample = Sample("a", [{"role": "user", "content": "q"}])
    texts = [["x", "long", "yy"], ["long", "long"]]
    rows = [
        Row(PromptRow(sample, [1]), answer, samples)
        for samples in [[Answer(text, [1], 1, False, 0.0, 1) for text in own] for own in texts]
        for answer in samples[:1]
    ]

    def score(samples: list[dict[str, str]]) -> list[Outcome]:
        return [
            Outcome("error", error="too long")
            if each["response"] == "long"
            else Outcome("ok", len(each["response"]))
            for each in samples
        ]

    said: list[str] = []
    _best_of_n(rows, _reward_scores(SimpleNamespace(score=score), rows, said.append), 0.0)  # type: ignore[arg-type]
    assert [row.chosen and row.chosen.text for row in rows] == ["yy", "long"]
    # What results.jsonl gets is JSON: minus infinity is not.
    assert [[each.score for each in row.samples] for row in rows] == [[1, None, 2], [None, None]]
    assert said == [
        "warning: the reward model scored 2 of 5 samples, and only they compete; first failure: too long"
    ]
