"""Published layouts, row by row: what each becomes, and what is refused with which words."""

import copy
from typing import Any

import pytest

from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.judged import adapt_judged
from rlhfctl.data.native import gsm8k_solutions
from rlhfctl.data.samples import Judgement, Sample


def step(*ratings: int, chosen: int | None = 0, human: str | None = None) -> dict[str, Any]:
    return {
        "completions": [{"text": f"{rating:+d}.{i}", "rating": rating} for i, rating in enumerate(ratings)],
        "chosen_completion": chosen,
        "human_completion": None if human is None else {"text": human, "rating": None},
    }


def prm800k(reason: str, *steps: dict[str, Any]) -> dict[str, Any]:
    question = {"problem": "2 + 2?", "ground_truth_answer": "4"}
    return {"labeler": "l", "question": question, "label": {"steps": list(steps), "finish_reason": reason}}


SHEPHERD = {
    "input": "2 + 2? Step 1: 2 + 2 = 4 ки\nStep 2: The answer is: 4 ки",
    "label": "2 + 2? Step 1: 2 + 2 = 4 +\nStep 2: The answer is: 4 -",
    "task": "GSM8K",
}


def judged(row: dict[str, Any], format: str) -> tuple[Sample, Judgement]:
    sample = adapt_judged(copy.deepcopy(row), format)
    assert sample.judgement is not None
    return sample, sample.judgement


def test_prm800k_is_the_path_that_was_followed() -> None:
    row = prm800k(
        "solution",
        step(1),
        step(-1, 1, chosen=1),
        step(0),
        step(-1, -1, chosen=None, human="mine"),
        step(1, chosen=0),
    )
    sample, judgement = judged(row, "prm800k")
    assert sample.messages == [{"role": "user", "content": "2 + 2?"}]
    assert judgement.steps == ["+1.0", "+1.1", "+0.0", "mine", "+1.0"]
    assert judgement.step_labels == [
        1.0,
        1.0,
        0.0,
        None,
        1.0,
    ]  # neutral is not right, a human's has no rating
    assert (judgement.reward, sample.label, sample.metadata["finish_reason"]) == (1.0, "4", "solution")

    wrong, judgement = judged(prm800k("found_error", step(1), step(-1, 1, chosen=None), step(1)), "prm800k")
    assert (judgement.steps, judgement.reward) == (["+1.0", "-1.0"], 0.0)  # nobody chose: the row ends there
    assert wrong.response == "+1.0\n-1.0"
    _, judgement = judged(prm800k("give_up", step(1), step(chosen=None)), "prm800k")
    assert (judgement.steps, judgement.reward) == (["+1.0"], 0.0)


def test_math_shepherd_has_a_mark_for_each_tag() -> None:
    sample, judgement = judged(SHEPHERD, "math_shepherd")
    assert sample.messages == [{"role": "user", "content": "2 + 2?"}]
    assert judgement.steps == ["Step 1: 2 + 2 = 4", "Step 2: The answer is: 4"]
    assert (judgement.step_labels, judgement.reward) == ([1.0, 0.0], 0.0)
    assert sample.metadata == {"task": "GSM8K"}


def test_gsm8k_solutions_are_one_trajectory_a_model() -> None:
    row = {
        "id": 3,
        "question": "2 + 2?",
        "ground_truth": "4\nA: 4,000",
        "a": {"is_correct": True, "solution": "4\nA: 4000"},
        "b": {"is_correct": False, "solution": "5\nA: 5"},
    }
    rows = gsm8k_solutions(row)
    assert [(each["id"], each["reward"], each["label"]) for each in rows] == [
        ("3/a", 1.0, "4000"),
        ("3/b", 0.0, "4000"),
    ]
    sample, judgement = judged(rows[1], "gsm8k_solutions")
    assert (sample.response, judgement.reward, sample.metadata) == ("5\nA: 5", 0.0, {"model": "b"})
    for broken, said in (
        ({"question": "q", "ground_truth": "A: 4"}, "holds no solution"),
        ({**row, "ground_truth": "4"}, "does not end with A:"),
    ):
        with pytest.raises(BadRow, match=said):
            gsm8k_solutions(broken)


@pytest.mark.parametrize(
    ("format", "row", "said"),
    [
        ("prm800k", {"prompt": "q"}, "has no question.problem or no label.steps"),
        ("prm800k", prm800k("bad_problem", step(1)), "ends with 'bad_problem'"),
        ("prm800k", prm800k("solution"), "holds no completion"),
        (
            "prm800k",
            prm800k("solution", {"completions": [{"text": " ", "rating": 1}]}),
            "an empty completion",
        ),
        ("prm800k", prm800k("solution", {"completions": ["x"]}), r"label.steps\[0\] is no object"),
        ("math_shepherd", {**SHEPHERD, "input": "no tag"}, "has no input with"),
        ("math_shepherd", {**SHEPHERD, "label": SHEPHERD["label"].replace("-", "?")}, r"at step 2"),
        ("math_shepherd", {**SHEPHERD, "input": SHEPHERD["input"] + " more"}, "goes on behind its last"),
        ("math_shepherd", {"input": "Step 1: 4 ки", "label": "Step 1: 4 +"}, "has no question before Step 1"),
    ],
)
def test_rows_that_cannot_be_used(format: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow, match=said):
        judged(row, format)


CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
)


def test_a_chatml_prompt_is_taken_apart() -> None:
    row = {"prompt": CHATML, "response": "4", "reward": 1}
    sample, _ = judged(row, "trajectory")
    assert sample.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
    ]
    closed, _ = judged({**row, "prompt": CHATML + "4<|im_end|>"}, "trajectory")
    assert closed.messages[0]["content"].startswith(
        "<|im_start|>"
    )  # no open turn: left as it is, refused later
