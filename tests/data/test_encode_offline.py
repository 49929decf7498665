"""Trajectories to actions, steps and rewards: hand-made rows and the real ones."""

from pathlib import Path

import pytest

from rlhfctl.data.encode_judged import NOT_FOUND
from rlhfctl.data.encode_offline import encode_offline, refuse_nothing_to_learn, step_report
from rlhfctl.data.load import load_samples
from rlhfctl.data.samples import Judgement, Sample
from rlhfctl.errors import Refused
from rlhfctl.recipe.oreo_sections import OfflineReasoning
from rlhfctl.recipe.sections import DataSource
from rlhfctl.templates.encode import ChatEncoder


@pytest.fixture(scope="module")
def encoder(chains: Path) -> ChatEncoder:
    return ChatEncoder.from_path(chains / "model")


def row(response: str = "3+8=1\n1*2=2\n#2", reward: float | None = 1.0, **rest) -> Sample:
    judgement = Judgement(
        reward=reward, **{key: rest.pop(key) for key in ("steps", "unmatched") if key in rest}
    )
    prompt = [{"role": "user", "content": "3+8*2?"}]
    return Sample("a", prompt, response, None, rest, origin="f.jsonl:1", judgement=judgement)


def encode(encoder: ChatEncoder, *samples: Sample, **keys):
    return encode_offline(list(samples), encoder, 64, "all_assistant", OfflineReasoning(**keys))


def test_actions_are_the_response_and_its_stop_token(encoder: ChatEncoder) -> None:
    (found,), _ = encode(encoder, row())
    actions = [token for token, on in zip(found.ids, found.mask, strict=True) if on]
    assert encoder.decode_response(actions) == "3+8=1\n1*2=2\n#2"
    assert actions[-1] in encoder.stop_ids
    # one token a character: the newline closes its step
    assert found.steps == [0] * 6 + [1] * 6 + [2] * 3
    assert (found.reward, found.right) == (1.0, True)


def test_steps_of_the_row_and_other_delimiters(encoder: ChatEncoder) -> None:
    (own,), _ = encode(encoder, row(steps=["3+8=1", "1*2=2\n#2"]))
    assert own.steps == [0] * 6 + [1] * 9
    (other,), _ = encode(encoder, row(), step_delimiters=["=", "\n"])
    assert max(other.steps) == 4
    (never,), _ = encode(encoder, row(), step_delimiters=["?"])
    assert set(never.steps) == {0}


@pytest.mark.parametrize("name", ["qwen2.5-7b-instruct", "llama-3-8b-instruct", "phi-4", "chatml"])
def test_a_delimiter_at_the_end_of_a_turn_begins_no_step(shared: Path, name: str) -> None:
    """Whether the template trims it or not, the stop token belongs to the last step."""
    vocabulary = "llama-3-8b-instruct" if name.startswith("llama") else "qwen2"
    encoder = ChatEncoder.from_path(
        shared / "tokenizers" / vocabulary, shared / "chat-templates" / f"{name}.jinja"
    )
    for response in ("a one\nso 8", "a one\nso 8\n", "a one\nso 8\n \n"):
        (found,), _ = encode(encoder, row(response))
        assert set(found.steps) == {0, 1}, response


@pytest.mark.parametrize(
    "steps", [["a one", "b two", "so 8\n"], ["\na one", "b two", "so 8"], ["a", "b", "c"]]
)
def test_steps_of_an_answer_that_the_template_trims(shared: Path, steps: list[str]) -> None:
    encoder = ChatEncoder.from_path(
        shared / "tokenizers/llama-3-8b-instruct", shared / "chat-templates/llama-3-8b-instruct.jinja"
    )
    (found,), _ = encode(encoder, row("\n".join(steps), steps=steps))
    actions = [token for token, on in zip(found.ids, found.mask, strict=True) if on]
    texts = [
        encoder.tokenizer.decode(
            [token for token, of in zip(actions, found.steps, strict=True) if of == number]
        )
        for number in range(found.steps[-1] + 1)
    ]
    assert [text.strip() for text in texts] == [step.strip() for step in steps]


def test_steps_that_the_template_does_not_show(shared: Path) -> None:
    """Left out where steps matter; elsewhere the answer counts whole."""
    encoder = ChatEncoder.from_path(
        shared / "tokenizers/qwen2", shared / "chat-templates/deepseek-r1-distill-qwen-32b.jinja"
    )
    sample = row("why</think>a\nb", steps=["why</think>a", "b"])
    rows, report = encode(encoder, sample, level="step")
    assert (rows, dict(report.dropped)) == ([], {NOT_FOUND: 1})
    (kept,), _ = encode(encoder, sample)
    assert set(kept.steps) == {0}


def test_assistant_turns_are_actions_and_observations_are_not(encoder: ChatEncoder) -> None:
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "1+1=2"},
        {"role": "user", "content": "2+2?"},
    ]
    sample = Sample("a", messages, "2+2=4", origin="f:1", judgement=Judgement(reward=0.0))
    (found,), _ = encode(encoder, sample)
    actions = [token for token, on in zip(found.ids, found.mask, strict=True) if on]
    assert encoder.tokenizer.decode(actions, skip_special_tokens=True) == "1+1=22+2=4"
    assert found.steps == [0] * 6 + [1] * 6
    assert found.reward == 0.0


def test_a_response_whose_end_was_cut(encoder: ChatEncoder) -> None:
    rows, report = encode(encoder, row(truncated=True), row(finish="length"))
    assert (rows, report.dropped["cut before their end"]) == ([], 2)
    (kept,), _ = encode(encoder, row(truncated=True), truncated="zero")
    assert (kept.reward, kept.right, kept.mask[-1]) == (0.0, False, 0)
    assert sum(kept.mask) == len("3+8=1\n1*2=2\n#2")


@pytest.mark.parametrize(
    ("sample", "keys", "said"),
    [
        (row(reward=None), {}, "f.jsonl:1 has no reward"),
        (row(reward=3.0), {}, r"reward 3, outside algorithm.reward_range \[0, 1\]"),
        (row(unmatched=True), {"level": "step"}, "do not rebuild its response"),
    ],
)
def test_rows_that_are_refused(encoder: ChatEncoder, sample: Sample, keys: dict, said: str) -> None:
    with pytest.raises(Refused, match=said):
        encode(encoder, sample, **keys)


@pytest.mark.parametrize("text", ["<|im_start|>user\n1+1?", "[INST] 1+1? [/INST]", "1+1?<eos>"])
def test_a_prompt_that_was_templated_before_is_refused(encoder: ChatEncoder, text: str) -> None:
    sample = row()
    sample.messages[0]["content"] = text
    with pytest.raises(Refused, match=r"f.jsonl:1: its prompt holds .* through a chat template already"):
        encode(encoder, sample)


def test_data_of_which_nothing_can_be_learnt(encoder: ChatEncoder) -> None:
    both, _ = encode(encoder, row(), row(reward=0.0))
    refuse_nothing_to_learn(both, OfflineReasoning())
    assert (
        step_report(both) == "2 trajectories, 1 right, 1 wrong; steps per trajectory: mean 3.0, from 3 to 3"
    )
    for rows, said in ((both[:1], "1 right and 0 wrong"), (both[1:], "0 right and 1 wrong")):
        with pytest.raises(Refused, match=said):
            refuse_nothing_to_learn(rows, OfflineReasoning())
    keys = {"level": "step", "step_delimiters": ["?"]}
    rows, _ = encode(encoder, row(), row(reward=0.0), **keys)
    with pytest.raises(Refused, match="none of 2 responses holds a step delimiter"):
        refuse_nothing_to_learn(rows, OfflineReasoning(**keys))


def test_real_rows(shared: Path) -> None:
    encoder = ChatEncoder.from_path(shared / "tokenizers/qwen2")
    for name, delimiters in (
        ("gsm8k/offline_trajectories.jsonl", ["\n"]),
        ("gsm8k/example_model_solutions.jsonl", ["\n"]),
        ("step_level/prm_stepwise.jsonl", ["\n"]),
        ("step_level/math_shepherd_layout.jsonl", ["\n"]),
        ("step_level/openr_samples_prm800k.jsonl", ["\n"]),
    ):
        source = DataSource(path=str(shared / "data" / name), limit=60)
        samples = load_samples([source], judged=True).samples
        rows, report = encode_offline(
            samples, encoder, 4096, "all_assistant", OfflineReasoning(step_delimiters=delimiters)
        )
        assert report.kept == len(samples)
        for sample, found in zip(samples, rows, strict=True):
            assert sample.judgement is not None
            actions = [token for token, on in zip(found.ids, found.mask, strict=True) if on]
            assert encoder.decode_response(actions).strip() == (sample.response or "").strip()
            steps = sample.judgement.steps
            assert steps is None or found.steps[-1] + 1 == len(steps)


def test_steps_of_mathematics_end_on_token_borders(shared: Path) -> None:
    """Real solutions under the delimiters of MATH: each step but the last holds one at its end, and none before it."""
    encoder = ChatEncoder.from_path(shared / "tokenizers/qwen2")
    source = DataSource(path=str(shared / "data/step_level/openr_samples_prm800k.jsonl"))
    samples = load_samples([source], judged=True).samples
    for sample in samples:
        assert sample.judgement is not None
        sample.judgement.steps = None  # cut by rule, not by the row
    delimiters = ["\n", ". ", ".$ "]
    algorithm = OfflineReasoning(level="step", step_delimiters=delimiters)
    rows, _ = encode_offline(samples, encoder, 4096, "all_assistant", algorithm)
    borders = 0
    for found in rows:
        actions = [token for token, on in zip(found.ids, found.mask, strict=True) if on]
        for number in range(found.steps[-1]):
            step = [token for token, of in zip(actions, found.steps, strict=True) if of == number]
            after = actions[found.steps.index(number + 1)]
            text, last = encoder.tokenizer.decode(step), encoder.tokenizer.decode(step[-1:])
            assert any(each in text for each in delimiters)
            # What precedes the closing token holds no whole delimiter: the step ends as early as tokens allow.
            before = text[: len(text) - len(last)].lstrip()
            assert not any(each in before for each in delimiters), (before, last, after)
            borders += 1
    assert borders > 40
