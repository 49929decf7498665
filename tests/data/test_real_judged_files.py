"""Every data file with judgements kept beside the checkout: its format, its rows, its bad rows, what it judges."""

import re
from collections import Counter
from pathlib import Path

import pytest

from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.load import load_samples
from rlhfctl.data.native_pairs import auto_j, panda_lm, rm_bench
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
    "reward_sanity/rmbench_chat_filtered.json": ("rm_bench", 95 * 9, 0),
    "reward_sanity/rmbench_safety-response_filtered.json": ("rm_bench", 157 * 9, 0),
    "reward_sanity/autoj_pairwise.jsonl": ("auto_j", 433 + 397, 1),
    "reward_sanity/pandalm_testset.json": ("panda_lm", 716, 58),
}
UNUSABLE = {
    "step_level/verify_then_generate.json": "no format with a judgement fits",
    "alpaca/alpaca_5000.json": "no format with a judgement fits",
    "gsm8k/train.jsonl": "no format with a judgement fits",
    "sharegpt/hh_harmless.sharegpt.json": "no format with a judgement fits",
}


# file -> (detected format, rows, trajectories with reward 1, step labels that are 1, 0, not there)
NATIVE = {
    "step_level/math_shepherd_layout.jsonl": ("math_shepherd", 1492, 746, (4519, 746, 0)),
    "step_level/openr_samples_math-shepherd.jsonl": ("math_shepherd", 7, 0, (5, 20, 0)),
    "step_level/openr_samples_prm800k.jsonl": ("prm800k", 6, 4, (41, 2, 2)),
    "gsm8k/example_model_solutions.jsonl": ("gsm8k_solutions", 3164, 1241, (0, 0, 0)),
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


@pytest.mark.parametrize("name", NATIVE)
def test_published_layouts(shared: Path, name: str) -> None:
    loaded = load(shared, name)
    (report,) = loaded.reports
    judgements = [sample.judgement for sample in loaded.samples if sample.judgement]
    labels = Counter(label for judgement in judgements for label in judgement.step_labels or [])
    right = sum(judgement.reward == 1.0 for judgement in judgements)
    counts = (labels[1.0], labels[0.0], labels[None])
    assert (report.format, report.used, right, counts) == NATIVE[name]
    assert not report.bad_rows
    for sample, judgement in zip(loaded.samples, judgements, strict=True):
        if judgement.steps is not None:
            assert "\n".join(judgement.steps) == sample.response


def test_solutions_of_several_models_are_the_trajectories_made_of_them(shared: Path) -> None:
    native = load(shared, "gsm8k/example_model_solutions.jsonl").samples
    made = load(shared, "gsm8k/offline_trajectories.jsonl").samples
    assert [
        (s.messages, s.response, s.judgement and s.judgement.reward, s.metadata["model"]) for s in native
    ] == [(s.messages, s.response, s.judgement and s.judgement.reward, s.metadata["model"]) for s in made]
    assert [sample.label for sample in native] == [sample.metadata["ground_truth"] for sample in made]


def test_step_labels_of_math_shepherd_are_those_of_the_rows_it_was_made_from(shared: Path) -> None:
    def labelled(name: str) -> set[tuple[tuple[str, ...], tuple[float | None, ...]]]:
        judgements = [sample.judgement for sample in load(shared, name).samples if sample.judgement]
        return {
            (
                tuple(re.sub(r"^Step \d+: ", "", step).strip() for step in judgement.steps or []),
                tuple(judgement.step_labels or []),
            )
            for judgement in judgements
        }

    native = labelled("step_level/math_shepherd_layout.jsonl")
    assert len(native) > 1000
    assert native <= labelled("step_level/prm_stepwise.jsonl")


@pytest.mark.parametrize("name", UNUSABLE)
def test_refused(shared: Path, name: str) -> None:
    with pytest.raises(Refused, match=UNUSABLE[name]):
        load(shared, name)


def test_the_majority_of_the_annotators_is_the_pair_made_of_it(shared: Path) -> None:
    def pairs(name: str) -> set[tuple[str, str]]:
        judged = (
            (each.response, each.judgement and each.judgement.rejected) for each in load(shared, name).samples
        )
        return {(str(better), str(worse[-1]["content"])) for better, worse in judged if worse}

    assert pairs("reward_sanity/pandalm_testset.json") == pairs("reward_sanity/pandalm_pairs.jsonl")


def test_styles_of_rm_bench(shared: Path) -> None:
    samples = load(shared, "reward_sanity/rmbench_chat_filtered.json").samples
    assert Counter(sample.metadata["level"] for sample in samples) == {
        "normal": 285,
        "easy": 285,
        "hard": 285,
    }
    assert samples[1].id == "12/concise-detailed"
    assert samples[1].metadata["level"] == "hard"


@pytest.mark.parametrize(
    ("make", "row", "said"),
    [
        (rm_bench, {"prompt": "p", "chosen": ["a"], "rejected": ["b"] * 3}, "not 3 texts"),
        (auto_j, {"prompt": "p", "label": 3, "response 1": "a", "response 2": "b"}, "0 the first"),
        (panda_lm, {"instruction": "p", "response1": "a", "response2": "b", "annotator1": 1}, "1, 2, or 0"),
    ],
)
def test_what_is_no_verdict(make, row, said) -> None:
    with pytest.raises(BadRow, match=said):
        make(row)
