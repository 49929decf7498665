"""Every data file with judgements kept beside the checkout: its format, its rows, its bad rows, what it judges."""

from collections import Counter
from pathlib import Path

import pytest

from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import DataSource

# file -> (detected format, rows, bad rows)
PAIRS = {
    "alpaca_eval_pairs/test.jsonl": ("preference", 750, 0),
    "alpaca_eval_pairs/train.jsonl": ("preference", 2994, 0),
    "hh_rlhf/harmless_base_test.messages.jsonl": ("preference", 302, 0),
    "hh_rlhf/harmless_base_train.messages.jsonl": ("preference", 1463, 0),
    "hh_rlhf/harmless_base_test.raw.jsonl": ("hh_transcript", 304, 2),
    "hh_rlhf/harmless_base_train.raw.jsonl": ("hh_transcript", 1472, 9),
    "llamafactory_demos/dpo_en_demo.json": ("preference", 300, 0),
    "llamafactory_demos/v1_dpo_demo.jsonl": ("preference", 10, 0),
    "reward_sanity/llmbar.jsonl": ("preference", 338, 0),
    "reward_sanity/pandalm_pairs.jsonl": ("preference", 716, 58),
    "reward_sanity/judgebench_gpt4o.raw.jsonl": ("preference", 350, 0),
}
UNUSABLE = {
    "reward_sanity/rmbench_chat_filtered.json": "none of its 95 rows can be used.*chosen",
    "reward_sanity/rmbench_safety-response_filtered.json": "none of its 157 rows can be used.*chosen",
    "reward_sanity/autoj_pairwise.jsonl": "no format with a judgement fits",
    "reward_sanity/pandalm_testset.json": "no format with a judgement fits",
    "step_level/verify_then_generate.json": "no format with a judgement fits",
    "step_level/math_shepherd_layout.jsonl": "no format with a judgement fits",
    "alpaca/alpaca_5000.json": "no format with a judgement fits",
    "gsm8k/train.jsonl": "no format with a judgement fits",
    "sharegpt/hh_harmless.sharegpt.json": "no format with a judgement fits",
}


def load(shared: Path, name: str):
    return load_samples([DataSource(path=str(shared / "data" / name))], max_bad_rows=400, judged=True)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(shared: Path, name: str) -> None:
    loaded = load(shared, name)
    (report,) = loaded.reports
    assert (report.format, report.rows, len(report.bad_rows)) == PAIRS[name]
    for sample in loaded.samples:
        assert sample.judgement is not None
        assert sample.judgement.rejected is not None
        assert sample.conversation() != sample.judgement.rejected
        assert sample.conversation()[-1]["role"] == sample.judgement.rejected[-1]["role"] == "assistant"


def test_raw_transcripts_and_the_messages_made_of_them_are_the_same_pairs(shared: Path) -> None:
    def pairs(name: str) -> list[str]:
        return [
            repr((sample.conversation(), sample.judgement and sample.judgement.rejected))
            for sample in load(shared, name).samples
        ]

    raw = pairs("hh_rlhf/harmless_base_train.raw.jsonl")
    made = pairs("hh_rlhf/harmless_base_train.messages.jsonl")
    assert len(set(raw) & set(made)) == len(made) == 1463


def test_step_labels(shared: Path) -> None:
    loaded = load(shared, "step_level/prm_stepwise.jsonl")
    assert (loaded.reports[0].format, len(loaded.samples)) == ("stepwise", 3241)
    marks = Counter(
        mark
        for sample in loaded.samples
        for mark in (sample.judgement and sample.judgement.step_labels) or []
    )
    assert set(marks) == {0.0, 1.0}
    assert marks[0.0] > 1000


def test_scored_trajectories(shared: Path) -> None:
    loaded = load(shared, "gsm8k/offline_trajectories.jsonl")
    assert (loaded.reports[0].format, len(loaded.samples)) == ("trajectory", 3164)
    rewards = Counter(sample.judgement.reward for sample in loaded.samples if sample.judgement)
    assert set(rewards) == {0.0, 1.0}
    assert min(rewards.values()) > 500
    marked = load(shared, "llamafactory_demos/kto_en_demo.json")
    assert (marked.reports[0].format, len(marked.samples)) == ("trajectory", 300)
    assert {sample.judgement.reward for sample in marked.samples if sample.judgement} == {0.0, 1.0}


@pytest.mark.parametrize("name", UNUSABLE)
def test_refused(shared: Path, name: str) -> None:
    with pytest.raises(Refused, match=UNUSABLE[name]):
        load(shared, name)
