"""Judged answers to measures, with the verdicts of the real verifier on chains written out here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfctl.data.encode import encode_prompts, encode_sft
from rlhfctl.data.encode_offline import encode_offline
from rlhfctl.data.load import load_samples
from rlhfctl.data.samples import Sample
from rlhfctl.evaluation import collect, compare, measures, results
from rlhfctl.evaluation.answers import Answer, Judge, verifier_of
from rlhfctl.evaluation.run import Row, State
from rlhfctl.evaluation.subject import verifier_source
from rlhfctl.recipe.oreo_sections import OfflineReasoning
from rlhfctl.recipe.sections import DataSource
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.verifiers import VerifierReward
from rlhfctl.rollout.delimiters import Delimiters
from rlhfctl.rollout.types import Rollout
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers.self_training import conversations

# 3+8=11, *2=2, -9=3, +5=8
RIGHT = "3+8=1\n1*2=2\n2-9=3\n3+5=8\n#8"
LUCKY = "3+8=6\n6*2=2\n2-9=3\n3+5=8\n#8"  # a wrong first step, and the right end
WRONG = "3+8=1\n1*2=2\n2-9=4\n4+5=9\n#9"
NONE = "3+8=1\n1*2=2\n"


@pytest.fixture(scope="module")
def encoder(chains: Path) -> ChatEncoder:
    return ChatEncoder.from_path(chains / "model")


def judged(encoder: ChatEncoder, texts: list[str], cut: tuple[int, ...] = ()) -> Row:
    """The answers to one prompt; the first one is the greedy one too. cut: without a stop token."""
    sample = Sample("a", [{"role": "user", "content": "3+8*2-9+5?"}], label="8")
    (prompt,), _ = encode_prompts([sample], encoder, None)
    rollouts = []
    for index, text in enumerate(texts):
        ids = encoder.encode_text(text) + ([] if index in cut else [encoder.stop_ids[0]])
        finish = "length" if index in cut else "stop"
        rollouts.append(Rollout(index, prompt.ids, ids, torch.full((len(ids),), -0.5), finish))  # type: ignore[arg-type]
    answers = Judge(
        [VerifierReward(verifier_source("chain_answer"))],
        encoder,
        Delimiters(["\n"], encoder.tokenizer.decode),
    )([prompt] * len(texts), rollouts)
    return Row(prompt, answers[0], answers)


def test_an_answer_is_read_as_the_verifier_reads_it(encoder: ChatEncoder) -> None:
    lucky, wrong, none = judged(encoder, [LUCKY, WRONG, NONE], cut=(2,)).samples
    assert (lucky.correct, lucky.path_correct, lucky.first_wrong_step, lucky.extracted) == (
        True,
        False,
        0,
        "8",
    )
    assert lucky.steps_right == [False] * 5
    assert (wrong.correct, wrong.first_wrong_step, wrong.extracted, wrong.steps) == (False, 2, "9", 5)
    assert wrong.steps_right == [True, True, False, False, False]
    assert (none.extracted, none.truncated, none.steps, none.tokens) == (None, True, 2, len(NONE))
    assert wrong.logprob == -0.5 * (len(WRONG) + 1)


def test_a_reward_function_may_say_less_than_the_verifier(encoder: ChatEncoder) -> None:
    class Mine:
        name, weight, span_weight = "mine.score", 1.0, 0.0

        def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
            return [Outcome("ok", 1.0, metrics={"correct": 1.0, "path_correct": 0.0}) for _ in samples]

        def close(self) -> None: ...

    row = judged(encoder, [RIGHT])
    rollout = Rollout(0, row.prompt.ids, row.greedy.ids, torch.zeros(len(row.greedy.ids)), "stop")
    (answer,) = Judge([Mine()], encoder, Delimiters(["\n"], encoder.tokenizer.decode))(
        [row.prompt], [rollout]
    )
    assert (answer.correct, answer.path_correct) == (True, False)
    assert (answer.first_wrong_step, answer.steps_right) == (None, None)


def test_measures_of_two_prompts(encoder: ChatEncoder) -> None:
    rows = [judged(encoder, [LUCKY, WRONG, WRONG, RIGHT]), judged(encoder, [WRONG, WRONG, NONE, RIGHT])]
    found = {name: estimate.value for name, estimate in measures.measure(rows, "sample_4", 4, 0).items()}
    assert found["accuracy/greedy"] == 0.5
    assert found["path_accuracy/greedy"] == 0.0
    assert found["first_wrong_step/greedy"] == 1.0  # steps 0 and 2
    assert found["accuracy/sample"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found["path_accuracy/sample"] == pytest.approx(1 / 4)
    assert found["pass@1"] == pytest.approx(3 / 8)
    assert found["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert found["pass@4"] == 1.0
    # 8 9 9 8: a tie, the 8 came first; 9 9 - 8: nine
    assert found["majority@4"] == 0.5
    assert found["steps_per_solved/greedy"] == 10.0
    assert found["tokens_per_solved/greedy"] == 2 * (len(RIGHT) + 1)


def test_the_cost_of_an_answer_that_nobody_judged_is_left_out(encoder: ChatEncoder) -> None:
    rows = [judged(encoder, [RIGHT, WRONG]), judged(encoder, [RIGHT, WRONG])]
    for row in rows:
        row.chosen, row.search_tokens, row.search_steps = row.samples[0], 70, 10
    rows[1].greedy.correct = None  # the first sample, too
    found = measures.measure(rows, "best_of_2", 2, 0)
    for name, value in (("greedy", 5), ("best_of_2", 10)):
        cost = found[f"steps_per_solved/{name}"]
        assert (cost.value, cost.n) == (value, 1)


def test_each_answer_without_a_verdict_is_counted_once(encoder: ChatEncoder) -> None:
    row = judged(encoder, [WRONG, RIGHT, RIGHT])
    row.samples[0].failure = "another source: timeout"  # takes no verdict away
    row.samples[1].correct, row.samples[1].failure = None, "rules: timeout"
    row.chosen = row.samples[1]
    assert measures.failures([row]) == 1


def test_votes_of_part_of_the_samples_are_averaged_over_blocks(encoder: ChatEncoder) -> None:
    row = judged(encoder, [WRONG, RIGHT, RIGHT, WRONG, WRONG, RIGHT, NONE, NONE])
    # blocks of four: 9 8 8 9 -> 9 (came first), 9 8 - - -> 9; blocks of three: 8, 9
    assert measures.voted_right(row.samples, 4) == 0.0
    assert measures.voted_right(row.samples, 3) == 0.5
    assert measures.sizes(6) == [1, 2, 4, 6]


def test_values_against_what_came_of_the_states(encoder: ChatEncoder) -> None:
    row = judged(encoder, [RIGHT])
    row.states = [State(2.0, 0.9, True, True), State(-1.0, 0.2, True, False)]
    other = judged(encoder, [WRONG])
    other.states = [State(1.0, 0.7, False, True), State(-2.0, 0.1, False, False)]
    found = measures.of_values([row, other], 0)
    assert found["value/auc"] is not None
    assert found["value/auc"].value == 0.75  # 2 > 1, 2 > -2, -1 < 1, -1 > -2
    assert found["value/step_auc"] is not None
    assert found["value/step_auc"].value == 1.0
    assert found["value/calibration_error"] is not None
    assert found["value/calibration_error"].value == pytest.approx((0.1 + 0.8 + 0.7 + 0.1) / 4)


def test_gains_over_greedy_are_paired(encoder: ChatEncoder) -> None:
    rows = [judged(encoder, [WRONG]), judged(encoder, [WRONG]), judged(encoder, [RIGHT])]
    for row, text in zip(rows, (RIGHT, WRONG, LUCKY), strict=True):
        row.chosen = judged(encoder, [text]).greedy
    found = measures.gains(rows, "beam_2")
    assert found["accuracy beam_2 - greedy"].value == pytest.approx(1 / 3)
    assert found["path_accuracy beam_2 - greedy"].value == pytest.approx((1 + 0 - 1) / 3)


def test_a_comparison_tells_of_ids_that_stand_for_other_prompts(encoder: ChatEncoder, tmp_path: Path) -> None:
    results.write_lines(tmp_path / "results.jsonl", results.records([judged(encoder, [RIGHT])], "greedy"))
    other = compare.read(tmp_path)
    asked = [{"role": "user", "content": "3+8*2-9+5?"}]
    under_system = [{"role": "system", "content": "Be brief."}, *asked]
    assert compare.other_prompts([Sample("a", asked), Sample("b", [])], other) is None
    assert compare.other_prompts([Sample("a", under_system)], other) is None
    told = compare.other_prompts([Sample("a", [{"role": "user", "content": "1+1?"}])], other)
    assert told is not None
    assert "1 of 1 ids in common have another prompt there, a first" in told


def test_balance_keeps_the_first_of_each_kind(encoder: ChatEncoder) -> None:
    answers = judged(encoder, [WRONG, RIGHT, WRONG, WRONG, LUCKY]).samples
    assert collect.balanced(answers, 1) == [0, 1]
    assert collect.balanced(answers, 2) == [0, 1, 2, 4]
    assert collect.balanced(answers, None) == [0, 1, 2, 3, 4]
    failed: Answer = answers[0]
    failed.correct = None
    assert collect.balanced(answers, 1) == [1, 2]


def test_a_trajectory_row_is_read_back_as_it_was(encoder: ChatEncoder, tmp_path: Path) -> None:
    row = judged(encoder, [RIGHT, NONE], cut=(1,))
    counts = collect.write(tmp_path / "t.jsonl", [row], None, ("\n",))
    assert counts == {"rows": 2, "right": 1, "wrong": 1, "truncated": 1, "left_out": 0}
    read = load_samples([DataSource(path=str(tmp_path / "t.jsonl"))], judged=True)
    assert read.reports[0].format == "trajectory"
    first, second = read.samples
    assert (first.id, first.label, first.metadata["truncated"]) == ("a/0", "8", False)
    assert first.prompt() == [{"role": "user", "content": "3+8*2-9+5?"}]
    assert first.judgement is not None
    assert (first.judgement.reward, first.judgement.steps) == (1.0, RIGHT.split("\n"))
    assert second.metadata["truncated"] is True
    assert second.judgement is not None
    assert second.judgement.reward == 0.0


def test_tools_stay_with_the_prompt_that_shows_them(shared: Path, tmp_path: Path) -> None:
    """What is trained on begins with the tokens that were sampled from."""
    encoder = ChatEncoder.from_path(
        shared / "tokenizers/qwen2", shared / "chat-templates/qwen2.5-7b-instruct.jinja"
    )
    tools = [{"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
    sample = Sample(
        "a", [{"role": "user", "content": "2+2?"}], label="4", metadata={"tools": json.dumps(tools)}
    )
    (prompt,), _ = encode_prompts([sample], encoder, None)
    assert '"name": "add"' in encoder.tokenizer.decode(prompt.ids)
    given = [("4", True), ("5", False)]
    answers = [
        Answer(text, [], 1, False, 0.0, 1, correct=right, reward=float(right)) for text, right in given
    ]
    collect.write(tmp_path / "t.jsonl", [Row(prompt, answers[0], answers)], None, ("\n",))
    results.write_lines(tmp_path / "s.jsonl", conversations(sample, ["4"]))

    judged_rows = load_samples([DataSource(path=str(tmp_path / "t.jsonl"))], judged=True).samples
    trained, _ = encode_offline(judged_rows, encoder, 512, "all_assistant", OfflineReasoning())
    supervised, _ = encode_sft(
        load_samples([DataSource(path=str(tmp_path / "s.jsonl"))]).samples, encoder, 512
    )
    assert len(trained) == 2
    assert len(supervised) == 1
    for row in (*trained, *supervised):
        assert row.ids[: len(prompt.ids)] == prompt.ids


def test_each_source_reads_answers_in_its_own_way() -> None:
    assert [verifier_of(name) for name in ("math_answer#2", "program_answer", "score")] == [
        "math_answer",
        "program_answer",
        "math_answer",
    ]
