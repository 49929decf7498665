from pathlib import Path

import pytest

from rlhfctl.data.encode import encode_prompts, encode_sft
from rlhfctl.data.load import load_samples
from rlhfctl.data.samples import Sample
from rlhfctl.quickstart.chains import make_tokenizer, write_model
from rlhfctl.recipe.sections import DataSource
from rlhfctl.templates.encode import ChatEncoder

REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
EOS = 18


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(REFUSES_SYSTEM, {"eos_token": "<eos>", "pad_token": "<pad>"}, make_tokenizer())


def chain(id: str, prompt: str, response: str | None) -> Sample:
    return Sample(id, [{"role": "user", "content": prompt}], response, origin=f"f:{id}")


def test_sft_rows_by_hand(encoder: ChatEncoder) -> None:
    rows, report = encode_sft([chain("1", "4-7?", "4-7=7\n#7")], encoder, max_length=64)
    (row,) = rows
    assert row.id == "1"
    assert row.ids == [4, 11, 7, 16, 4, 11, 7, 13, 7, 14, 15, 7, EOS]
    assert row.mask == [0] * 4 + [1] * 9  # the stop token is trained
    assert report.sentence() == "kept 1 of 1 rows"


def test_last_assistant_alone(encoder: ChatEncoder) -> None:
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "#1"},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "#2"},
    ]
    sample = Sample("a", messages)
    every, _ = encode_sft([sample], encoder, 64)
    last, _ = encode_sft([sample], encoder, 64, "last_assistant")
    assert every[0].ids == last[0].ids == [1, 16, 15, 1, EOS, 2, 16, 15, 2, EOS]
    assert every[0].mask == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    assert last[0].mask == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_an_assistant_message_of_weight_0_is_read_and_not_trained(encoder: ChatEncoder, key: str) -> None:
    def row(first: float, second: float) -> Sample:
        messages = [
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": "#1", key: first},
            {"role": "user", "content": "2?", key: 0},
            {"role": "assistant", "content": "#2", key: second},
        ]
        return Sample("a", messages)

    rows, report = encode_sft([row(0, 1), row(1, 0.0), row(1, 1), row(0, 0)], encoder, 64)
    assert [row.ids for row in rows] == [[1, 16, 15, 1, EOS, 2, 16, 15, 2, EOS]] * 3
    assert [row.mask for row in rows] == [
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 1, 1, 1],
    ]
    assert report.sentence() == (
        "kept 3 of 4 rows; 1 no trained token (a: no assistant turn, or none of a weight but 0)"
    )
    assert encode_sft([row(1, 0)], encoder, 64, "last_assistant")[0] == []


def test_what_is_left_out_is_counted_with_its_reason(encoder: ChatEncoder) -> None:
    samples = [
        chain("1", "4-7?", "4-7=7\n#7"),  # 13 tokens
        chain("2", "4-7+1?", "4-7=7\n7+1=8\n#8"),
        chain("3", "4-7?", None),
        Sample(
            "4", [{"role": "system", "content": "1"}, {"role": "user", "content": "1"}], "1", origin="f:4"
        ),
        *(chain(str(5 + i), "4-7+1?", "4-7=7\n7+1=8\n#8") for i in range(6)),
    ]
    rows, report = encode_sft(samples, encoder, max_length=13)
    assert [row.id for row in rows] == ["1"]
    assert report.dropped == {"too long": 7, "no trained token": 1, "refused by the chat template": 1}
    assert report.examples["too long"][0] == "f:2: 21 tokens"
    assert len(report.examples["too long"]) == 5
    assert report.examples["refused by the chat template"] == ["f:4: no system role"]
    assert report.sentence().startswith("kept 1 of 10 rows; 7 too long (f:2: 21 tokens, f:5: 21 tokens")


def test_a_character_that_the_tokenizer_does_not_know_drops_its_row(encoder: ChatEncoder) -> None:
    samples = [chain("1", "4/7?", "4"), chain("2", "4-7?", "7")]
    rows, report = encode_sft(samples, encoder, 64)
    prompts, prompt_report = encode_prompts(samples, encoder, None)
    assert [row.id for row in rows] == [row.sample.id for row in prompts] == ["2"]
    assert report.dropped == prompt_report.dropped == {"refused by the tokenizer": 1}
    assert report.examples["refused by the tokenizer"][0].startswith("f:1: WordLevel error")


def test_prompts(encoder: ChatEncoder) -> None:
    samples = [
        chain("1", "4-7?", "the reference answer is no part of the prompt"),
        chain("2", "4-7+1?", None),
        Sample("3", [{"role": "assistant", "content": "#1"}], origin="f:3"),
        Sample("4", [{"role": "system", "content": "1"}], origin="f:4"),
        Sample("5", [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "#1"}]),
    ]
    rows, report = encode_prompts(samples, encoder, max_prompt_length=4)
    assert [(row.sample.id, row.ids) for row in rows] == [("1", [4, 11, 7, 16]), ("5", [1, 16])]
    assert report.dropped == {"too long": 1, "no prompt": 1, "refused by the chat template": 1}
    assert len(encode_prompts(samples, encoder, None)[0]) == 3


def test_chain_directory_as_published(tmp_path: Path) -> None:
    """The quickstart's own template: the prompt is bare, the answer ends with the stop token."""
    write_model(tmp_path)
    encoder = ChatEncoder.from_path(tmp_path)
    assert (encoder.stop_ids, encoder.pad_id, encoder.vocab_size) == ((EOS,), 17, 19)
    rows, _ = encode_sft([chain("1", "4-7?", "4-7=7\n#7")], encoder, 64)
    assert (rows[0].ids[-1], rows[0].mask) == (EOS, [0] * 4 + [1] * 9)
    assert encoder.decode_response(rows[0].ids[4:]) == "4-7=7\n#7"


@pytest.mark.parametrize("model", ["models/stories260k", "tokenizers/qwen2"])
def test_real_rows(shared: Path, model: str) -> None:
    """Every kept row trains its stop token and not its prompt; lengths and texts add up."""
    encoder = ChatEncoder.from_path(shared / model)
    source = DataSource(path=str(shared / "data/alpaca/alpaca_2000.messages.jsonl"), limit=200)
    samples = load_samples([source]).samples
    rows, report = encode_sft(samples, encoder, max_length=256)
    assert report.kept == len(rows)
    assert report.kept + sum(report.dropped.values()) == 200
    assert set(report.dropped) <= {"too long"}
    by_id = {sample.id: sample for sample in samples}
    for row in rows:
        answer = by_id[row.id].messages[-1]["content"]
        trained = [token for token, on in zip(row.ids, row.mask, strict=True) if on]
        assert trained[-1] in encoder.stop_ids or trained[-2] in encoder.stop_ids
        assert row.mask[0] == 0
        assert answer in encoder.tokenizer.decode(trained, skip_special_tokens=False)


WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }}{% endfor %}#{% endif %}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "tools",
    [[{"name": "7"}], '[{"name": "7"}]', [{"type": "function", "function": {"name": "7"}}]],
    ids=["bare", "text", "wrapped"],
)
def test_tools_of_a_row_are_rendered(tools: object) -> None:
    encoder = ChatEncoder(WITH_TOOLS, {"eos_token": "<eos>"}, make_tokenizer())
    sample = Sample("a", [{"role": "user", "content": "1?"}], "#1", metadata={"tools": tools})
    rows, _ = encode_sft([sample], encoder, 64)
    assert rows[0].ids == [7, 15, 1, 16, 15, 1, EOS]
    assert rows[0].mask == [0, 0, 0, 0, 1, 1, 1]
    assert encode_prompts([sample], encoder, None)[0][0].ids == [7, 15, 1, 16]


@pytest.mark.parametrize(
    ("tools", "dropped"), [("[]", 0), ("", 0), (None, 0), ("{", 1), ("[1]", 1), ({"a": 1}, 1)]
)
def test_tools_that_are_none_and_tools_that_are_no_tools(
    encoder: ChatEncoder, tools: object, dropped: int
) -> None:
    sample = Sample("a", [{"role": "user", "content": "1?"}], "#1", metadata={"tools": tools})
    rows, report = encode_sft([sample], encoder, 64)
    assert (len(rows), report.dropped["unreadable tools"]) == (1 - dropped, dropped)


def test_real_tool_calls(shared: Path) -> None:
    """Function calling data through a template that knows tools: the definitions stand in the prompt, untrained."""
    encoder = ChatEncoder.from_path(
        shared / "tokenizers/qwen2", shared / "chat-templates/qwen2.5-7b-instruct.jinja"
    )
    source = DataSource(path=str(shared / "data/llamafactory_demos/glaive_toolcall_en_demo.json"), limit=40)
    samples = load_samples([source]).samples
    rows, report = encode_sft(samples, encoder, max_length=8192)
    assert (len(rows), report.dropped) == (40, {})
    with_tools = [row for row, sample in zip(rows, samples, strict=True) if sample.metadata["tools"] != "[]"]
    assert len(with_tools) > 20
    for row in with_tools:
        text = encoder.tokenizer.decode(row.ids, skip_special_tokens=False)
        trained = encoder.tokenizer.decode(
            [token for token, on in zip(row.ids, row.mask, strict=True) if on], skip_special_tokens=False
        )
        assert "<tools>" in text
        assert "<tools>" not in trained
    calls = sum("tool_calls" in message for sample in samples for message in sample.messages)
    every_trained = "".join(
        encoder.tokenizer.decode(
            [t for t, on in zip(row.ids, row.mask, strict=True) if on], skip_special_tokens=False
        )
        for row in rows
    )
    assert every_trained.count("<tool_call>") == calls
