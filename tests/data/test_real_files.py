"""Every data file kept beside the checkout: its format, its rows, its bad rows, its ids."""

import json
from pathlib import Path

import pytest

from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import DataSource

# file -> (detected format, rows, bad row numbers, repeated rows)
TAKEN = {
    "alpaca/alpaca_2000.messages.jsonl": ("messages", 2000, [], 0),
    "alpaca/alpaca_5000.json": ("alpaca", 5000, [2336, 4659], 0),
    "bbh/boolean_expressions.jsonl": ("qa", 250, [], 0),
    "bbh/multistep_arithmetic_two.jsonl": ("qa", 250, [], 0),
    "bbh/navigate.jsonl": ("qa", 250, [], 0),
    "bbh/object_counting.jsonl": ("qa", 250, [], 0),
    "gsm8k/test.jsonl": ("qa", 791, [], 0),
    "gsm8k/train.jsonl": ("qa", 7473, [], 0),
    "hh_rlhf/harmless_base_test.raw.jsonl": ("hh_transcript", 304, [269], 0),
    "hh_rlhf/harmless_base_train.raw.jsonl": (
        "hh_transcript",
        1472,
        [60, 329, 487, 586, 698, 798, 1083, 1176, 1244],
        0,
    ),
    "llamafactory_demos/alpaca_en_demo.json": ("alpaca", 999, [], 14),
    "llamafactory_demos/glaive_toolcall_en_demo.json": ("sharegpt", 300, [], 35),
    "llamafactory_demos/identity.json": ("alpaca", 91, [], 0),
    "llamafactory_demos/v1_sft_demo.jsonl": ("messages", 500, [], 1),
    "math_word/aqua_dev_test.jsonl": ("qa", 508, [], 0),
    "math_word/asdiv.jsonl": ("qa", 2215, [], 0),
    "math_word/math500.jsonl": ("qa", 500, [], 0),
    "math_word/mathqa_1k.jsonl": ("qa", 1000, [], 0),
    "math_word/mawps.jsonl": ("qa", 2065, [], 0),
    "math_word/mawps_addsub.jsonl": ("qa", 395, [], 0),
    "math_word/mawps_multiarith.jsonl": ("qa", 600, [], 20),
    "math_word/mawps_singleeq.jsonl": ("qa", 508, [], 0),
    "math_word/mawps_singleop.jsonl": ("qa", 562, [], 31),
    "reft/mathqa-numeric_test_set.json": ("qa", 1605, [], 0),
    "reft/mathqa_test_set.json": ("qa", 1605, [], 0),
    "reft/svamp_nl.json": ("qa", 3076, [], 0),
    "reft/svamp_python_sdp.json": ("qa", 3043, [], 0),
    "reft/svamp_test_set.json": ("qa", 600, [], 0),
    "sharegpt/dummy_conversation.json": ("sharegpt", 500, [], 0),
    "sharegpt/hh_harmless.sharegpt.json": ("sharegpt", 500, [], 0),
    "step_level/bigbench_mistake/dyck_languages.jsonl": ("qa", 789, [], 0),
    "step_level/bigbench_mistake/logical_deduction.jsonl": ("qa", 240, [], 0),
    "step_level/bigbench_mistake/multistep_arithmetic.jsonl": ("qa", 240, [], 0),
    "step_level/bigbench_mistake/tracking_shuffled_objects.jsonl": ("qa", 240, [], 0),
    "step_level/bigbench_mistake/word_sorting.jsonl": ("qa", 240, [], 0),
}

PREFERENCE, SCORED, UNKNOWN = "preference pairs", "scored trajectories", "no format fits"
REFUSED = {
    "alpaca/seed_tasks.jsonl": UNKNOWN,
    "alpaca_eval_pairs/test.jsonl": PREFERENCE,
    "alpaca_eval_pairs/train.jsonl": PREFERENCE,
    "gsm8k/example_model_solutions.jsonl": "solutions of several models",
    "gsm8k/offline_trajectories.jsonl": SCORED,
    "hh_rlhf/harmless_base_test.messages.jsonl": PREFERENCE,
    "hh_rlhf/harmless_base_train.messages.jsonl": PREFERENCE,
    "llamafactory_demos/dpo_en_demo.json": PREFERENCE,
    "llamafactory_demos/kto_en_demo.json": "marked good or bad",
    "llamafactory_demos/v1_dpo_demo.jsonl": UNKNOWN,
    "mt_bench/question.jsonl": UNKNOWN,
    "mt_bench/reference_answer_gpt-4.jsonl": UNKNOWN,
    "reward_sanity/autoj_pairwise.jsonl": UNKNOWN,
    "reward_sanity/judgebench_gpt4o.raw.jsonl": UNKNOWN,
    "reward_sanity/llmbar.jsonl": PREFERENCE,
    "reward_sanity/pandalm_pairs.jsonl": PREFERENCE,
    "reward_sanity/pandalm_testset.json": UNKNOWN,
    "reward_sanity/rmbench_chat_filtered.json": PREFERENCE,
    "reward_sanity/rmbench_safety-response_filtered.json": PREFERENCE,
    "step_level/math_shepherd_layout.jsonl": "step-labelled rows",
    "step_level/openr_samples_math-aps.jsonl": UNKNOWN,
    "step_level/openr_samples_math-shepherd.jsonl": "step-labelled rows",
    "step_level/openr_samples_prm800k.jsonl": "step-labelled rows",
    "step_level/prm_stepwise.jsonl": "step-labelled rows",
    "step_level/verify_then_generate.json": UNKNOWN,
}


def load(shared: Path, name: str, **keys: object):
    return load_samples([DataSource(path=str(shared / "data" / name), **keys)], max_bad_rows=20)


def raw_rows(shared: Path, name: str) -> list[dict]:
    text = (shared / "data" / name).read_text(encoding="utf-8")
    return (
        json.loads(text)
        if name.endswith(".json")
        else [json.loads(line) for line in text.split("\n") if line]
    )


def test_every_file_is_there(shared: Path) -> None:
    files = {str(path.relative_to(shared / "data")) for path in (shared / "data").rglob("*.json*")}
    assert files >= set(TAKEN) | set(REFUSED)


@pytest.mark.parametrize("name", TAKEN)
def test_taken(shared: Path, name: str) -> None:
    format, rows, bad, repeated = TAKEN[name]
    loaded = load(shared, name)
    (report,) = loaded.reports
    assert (report.format, report.rows, len(report.duplicate_ids)) == (format, rows, repeated)
    assert [number for number, _ in report.bad_rows] == bad
    assert len(loaded.samples) == rows - len(bad)
    assert len({sample.id for sample in loaded.samples}) == len(loaded.samples)
    assert [sample.id for sample in loaded.samples] == [sample.id for sample in load(shared, name).samples]
    assert all(sample.prompt()[-1]["role"] in ("user", "tool") for sample in loaded.samples)
    conversations = (sample.conversation() for sample in loaded.samples)
    assert all(conversation[-1]["role"] == "assistant" for conversation in conversations)


@pytest.mark.parametrize("name", TAKEN)
def test_metadata_is_every_other_column_untouched(shared: Path, name: str) -> None:
    rows = raw_rows(shared, name)
    for sample in load(shared, name).samples:
        row = rows[int(sample.origin.rpartition(":")[2]) - 1]
        assert all(row[key] == value for key, value in sample.metadata.items())
        taken = set(row) - set(sample.metadata)
        assert taken <= KNOWN[TAKEN[name][0]], (name, taken)


KNOWN = {
    "messages": {"messages"},
    "sharegpt": {"conversations", "id"},
    "alpaca": {"instruction", "input", "output"},
    "hh_transcript": {"chosen"},
    "qa": {
        *("question", "problem", "input", "body", "answer", "target", "answer_value", "correct"),
        *("answer_cot", "solution", "rationale", "item_id", "unique_id"),
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(shared: Path, name: str) -> None:
    with pytest.raises(Refused, match=REFUSED[name]) as caught:
        load(shared, name)
    assert name in caught.value.message


def test_default_of_no_bad_rows_names_the_two_empty_outputs(shared: Path) -> None:
    source = DataSource(path=str(shared / "data/alpaca/alpaca_5000.json"))
    with pytest.raises(Refused, match=r"2 bad rows.*row 2336: output is empty; row 4659: output is empty$"):
        load_samples([source])


def test_alpaca_rows_become_the_messages_that_were_made_of_them(shared: Path) -> None:
    ours = load(shared, "alpaca/alpaca_5000.json", limit=2000).samples
    theirs = load(shared, "alpaca/alpaca_2000.messages.jsonl").samples
    assert [sample.conversation() for sample in ours] == [sample.conversation() for sample in theirs]


def test_hh_transcripts_become_the_messages_that_were_made_of_them(shared: Path) -> None:
    raw = load(shared, "hh_rlhf/harmless_base_train.raw.jsonl").samples
    preferred = load(
        shared,
        "hh_rlhf/harmless_base_train.messages.jsonl",
        format="prompt_response",
        columns={"chosen": "response"},
    ).samples
    mine = {json.dumps(sample.conversation()) for sample in raw}
    assert sum(json.dumps(sample.conversation()) in mine for sample in preferred) == len(preferred) == 1463


def test_refused_files_load_by_the_way_out_that_the_refusal_names(shared: Path) -> None:
    scored = load(
        shared,
        "gsm8k/offline_trajectories.jsonl",
        format="prompt_response",
        columns={"ground_truth": "label"},
    )
    assert (len(scored.samples), scored.samples[0].label, scored.samples[0].metadata["reward"]) == (
        3164,
        "18",
        0.0,
    )
    parts = load(shared, "llamafactory_demos/v1_dpo_demo.jsonl", columns={"chosen_messages": "messages"})
    assert len(parts.samples) == 10
    assert all(isinstance(message["content"], str) for message in parts.samples[0].messages)


def test_tool_calls_of_glaive(shared: Path) -> None:
    messages = [
        m
        for sample in load(shared, "llamafactory_demos/glaive_toolcall_en_demo.json").samples
        for m in sample.messages
    ]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert len(calls) == 211
    assert calls[0]["function"]["name"] == "search_recipes"
    assert calls[0]["function"]["arguments"] == {"ingredients": ["chicken", "bell peppers", "rice"]}
    assert sum(message["role"] == "tool" for message in messages) == 211
