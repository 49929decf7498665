"""What a reward model reads of a sample: the bridge's ids, and the tokens at which answers and steps are scored."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfctl.data.encode_judged import ALIKE, NOTHING_JUDGED, Wanted, encode_judged, pipeline
from rlhfctl.data.judged import adapt_judged
from rlhfctl.recipe.sections import Template
from rlhfctl.templates.encode import ChatEncoder

PAIRWISE = Wanted("pairwise", False, False, 0.5)
EVERYTHING = Wanted("pairwise", True, True, 0.5)
STEPS = {"prompt": "1+2?", "completions": ["1+2=3", "#3"], "labels": [True, False]}
HUMAN = {"completions": [], "human_completion": {"text": "1+2=3", "rating": None}, "chosen_completion": None}
UNRATED = {"question": {"problem": "1+2?"}, "label": {"steps": [HUMAN], "finish_reason": "solution"}}
PAIR = {"prompt": "1+2?", "chosen": "1+2=3\n#3", "rejected": "#4", "margin": 0.5}


@pytest.fixture(scope="module")
def encoder(chains):
    return ChatEncoder.from_path(chains / "model")


@pytest.fixture(scope="module")
def bridge(encoder):
    return pipeline(Template(), encoder)


def one(bridge, row, format, wanted, max_length=64):
    rows, report = encode_judged([adapt_judged(row, format)], bridge, max_length, wanted)
    return (rows[0] if rows else None), report


def text(encoder, ids):
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_pair(bridge, encoder):
    row, _ = one(bridge, PAIR, "preference", EVERYTHING)
    assert text(encoder, row.chosen.ids) == "1+2?1+2=3\n#3<eos>"
    assert text(encoder, row.rejected.ids) == "1+2?#4<eos>"
    assert text(encoder, [row.chosen.ids[i] for i in row.chosen.response]) == "1+2=3\n#3<eos>"
    assert text(encoder, [row.rejected.ids[i] for i in row.rejected.response]) == "#4<eos>"
    assert (row.margin, row.target, row.step_labels, row.ids) == (0.5, None, [], row.chosen.ids)
    plain, _ = one(bridge, PAIR, "preference", PAIRWISE)
    assert plain.chosen.response == plain.chosen.steps == []


def test_steps_end_at_their_last_character(bridge, encoder):
    row, _ = one(bridge, STEPS, "stepwise", Wanted("step", True, False, 0.5))
    assert [text(encoder, row.chosen.ids[: end + 1]) for end in row.chosen.steps] == [
        "1+2?1+2=3",
        "1+2?1+2=3\n#3",
    ]
    assert (row.step_labels, row.labelled) == ([1.0, 0.0], 2)


def test_repeated_steps_are_found_one_after_the_other(bridge, encoder):
    row, _ = one(
        bridge,
        {"prompt": "1?", "completions": ["1", "1", "1"], "labels": [1, None, 0]},
        "stepwise",
        EVERYTHING,
    )
    assert text(encoder, row.chosen.ids) == "1?1\n1\n1<eos>"
    assert row.chosen.steps == [2, 4, 6]
    assert row.labelled == 2


@pytest.mark.parametrize(
    ("row", "format", "wanted", "target"),
    [
        ({"prompt": "1?", "response": "2", "reward": 0.7}, "trajectory", 0.5, 1.0),
        ({"prompt": "1?", "response": "2", "reward": 0.7}, "trajectory", 0.7, 0.0),
        ({"prompt": "1?", "response": "2", "reward": False}, "trajectory", 0.5, 0.0),
        (PAIR, "preference", 5.0, 1.0),
        (STEPS | {"reward": True}, "stepwise", 0.5, 1.0),
    ],
)
def test_targets_of_answers(bridge, row, format, wanted, target):
    assert one(bridge, row, format, Wanted("outcome", False, False, wanted))[0].target == target


@pytest.mark.parametrize(
    ("row", "format", "wanted"),
    [
        (STEPS, "stepwise", PAIRWISE),
        (STEPS, "stepwise", Wanted("outcome", False, False, 0.5)),
        (PAIR, "preference", Wanted("step", True, False, 0.5)),
        ({"prompt": "1?", "response": "2", "reward": 1}, "trajectory", PAIRWISE),
        (UNRATED, "prm800k", Wanted("step", True, False, 0.5)),
    ],
)
def test_rows_without_what_the_objective_uses_are_left_out_and_counted(bridge, row, format, wanted):
    found, report = one(bridge, row, format, wanted)
    assert found is None
    assert report.dropped == {NOTHING_JUDGED: 1}


def test_too_long_and_unreadable_rows(bridge):
    assert one(bridge, PAIR, "preference", PAIRWISE, max_length=14)[0] is not None
    found, report = one(bridge, PAIR, "preference", PAIRWISE, max_length=12)
    assert (found, dict(report.dropped)) == (None, {"too long": 1})
    _, report = one(bridge, PAIR | {"rejected": "words"}, "preference", PAIRWISE)
    assert report.dropped == {"refused by the tokenizer": 1}


def test_control_tokens_in_the_text(bridge, shared):
    """They are read as the plain text they are, and the answer's tokens are located among them."""
    encoder = ChatEncoder.from_path(shared / "models/babyllama-361")
    markers = [marker for marker in encoder.markers if marker]
    assert markers
    row = {"prompt": "hello", "chosen": f"a {markers[0]} b", "rejected": "c"}
    other = pipeline(Template(), encoder)
    kept, _ = one(other, row, "preference", PAIRWISE)
    assert kept is not None
    special = encoder.tokenizer.token_to_id(markers[0])
    plain, _ = one(other, row | {"chosen": "a b"}, "preference", PAIRWISE)
    assert kept.chosen.ids.count(special) == plain.chosen.ids.count(special)
    found, _ = one(other, row, "preference", EVERYTHING)
    assert found.chosen.ids == kept.chosen.ids
    said = text(encoder, [found.chosen.ids[place] for place in found.chosen.response])
    assert said.startswith(f"a {markers[0]} b")


@pytest.fixture(scope="module")
def llama(shared):
    """Trims its contents, and ends answers with <|eot_id|>."""
    return ChatEncoder.from_path(
        shared / "tokenizers/llama-3-8b-instruct", shared / "chat-templates/llama-3-8b-instruct.jinja"
    )


@pytest.mark.parametrize("answer", ["e", "E", "id", "B", "eot_id", "|", " e", "e\n", "assistant"])
def test_an_answer_that_stands_in_its_end_marker_too(llama, answer):
    row = {"prompt": "Which letter?", "completions": [answer.strip()], "labels": [1]}
    found, _ = one(pipeline(Template(), llama), row, "stepwise", EVERYTHING)
    given, end = found.chosen.response[:-1], found.chosen.response[-1]
    assert text(llama, [found.chosen.ids[i] for i in given]) == answer.strip()
    assert llama.tokenizer.id_to_token(found.chosen.ids[end]) == "<|eot_id|>"
    assert found.chosen.steps == [given[-1]]
    pair, _ = one(
        pipeline(Template(), llama),
        {"prompt": "a", "chosen": answer, "rejected": "no"},
        "preference",
        EVERYTHING,
    )
    assert answer.strip() in text(llama, [pair.chosen.ids[i] for i in pair.chosen.response])


def test_pairs_that_a_model_reads_as_the_same(llama):
    row = {"prompt": "1?", "chosen": "It is 2.", "rejected": "It is 2. \n"}
    for wanted in (PAIRWISE, Wanted("outcome", False, False, 0.5)):
        found, report = one(pipeline(Template(), llama), row, "preference", wanted)
        assert (found, dict(report.dropped)) == (None, {ALIKE: 1})
    qwen = row | {"rejected": "It is 2.\n\nIndeed."}
    assert one(pipeline(Template(), llama), qwen, "preference", PAIRWISE)[0] is not None


@pytest.mark.parametrize("name", ["stories260k", "babyllama-361"])
@settings(max_examples=60)
@given(
    steps=st.lists(
        st.text("abc, .!e\u00e9", min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=4
    )
)
def test_every_step_ends_inside_its_own_tokens(shared, name, steps):
    """On byte-level vocabularies: the token at a step's end holds its last character, and ends never go back."""
    encoder = ChatEncoder.from_path(shared / "models" / name)
    row = {"prompt": "question", "completions": steps, "labels": [1] * len(steps)}
    found, _ = one(pipeline(Template(), encoder), row, "stepwise", EVERYTHING, max_length=1000)
    if found is None:
        return  # a template that changes the response's text
    ends = found.chosen.steps
    assert ends == sorted(ends)
    assert found.chosen.response[0] <= ends[0]
    assert found.chosen.response[-1] == len(found.chosen.ids) - 1
    assert ends[-1] <= len(found.chosen.ids) - 1
    before = text(encoder, found.chosen.ids[: ends[-1] + 1])
    assert before.rstrip().endswith(steps[-1].strip()[-1])
