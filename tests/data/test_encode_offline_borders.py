"""Trajectories at the borders of what is right, and at the beginning of a conversation."""

from pathlib import Path

import pytest

from rlhfctl.data.encode_offline import encode_offline, reward_of
from rlhfctl.data.samples import Judgement, Sample
from rlhfctl.recipe.oreo_sections import OfflineReasoning
from rlhfctl.templates.encode import ChatEncoder

PROMPT = [{"role": "user", "content": "1+1?"}]


@pytest.fixture(scope="module")
def encoder(chains: Path) -> ChatEncoder:
    return ChatEncoder.from_path(chains / "model")


def test_a_reward_at_the_threshold_is_wrong(encoder: ChatEncoder) -> None:
    samples = [
        Sample("a", PROMPT, "#2", origin="f:1", judgement=Judgement(reward=reward)) for reward in (0.25, 0.26)
    ]
    rows, _ = encode_offline(samples, encoder, 64, "all_assistant", OfflineReasoning(threshold=0.25))
    assert [(row.right, row.reward) for row in rows] == [(False, 0.0), (True, 1.0)]


@pytest.mark.parametrize(("label", "reward"), [(0.5, 0.0), (0.51, 1.0), (None, 0.0)])
def test_a_step_of_one_half_is_not_right(label: float | None, reward: float) -> None:
    judgement = Judgement(steps=["1+1=2", "#2"], step_labels=[1.0, label])
    sample = Sample("a", PROMPT, "1+1=2\n#2", origin="f:1", judgement=judgement)
    assert reward_of(sample, OfflineReasoning()) == reward


def test_the_first_token_of_a_conversation_is_no_action(chains: Path) -> None:
    """A template that writes nothing before an answer that the conversation begins with: nothing predicts its start."""
    bare = chains / "bare.jinja"
    bare.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder.from_path(chains / "model", bare)
    messages = [{"role": "assistant", "content": "3+4"}, *PROMPT]
    sample = Sample("a", messages, "#2", origin="f:1", judgement=Judgement(reward=1.0))
    (row,), _ = encode_offline([sample], encoder, 64, "all_assistant", OfflineReasoning())
    assert encoder.tokenizer.decode(row.ids, skip_special_tokens=True) == "3+41+1?#2"
    assert row.mask == [0, 1, 1, 1] + [0] * 4 + [1] * 3
    assert len(row.steps) == sum(row.mask)
