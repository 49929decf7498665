"""Prompts, loss masks and stop ids: hand-written cases, then every template of the corpus."""

import json
from pathlib import Path

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer

from rlhfctl.errors import TemplateMismatch, UsageError
from rlhfctl.templates.encode import ChatEncoder, load_side


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def trained(encoder: ChatEncoder, messages: list[dict], train_on: str = "all_assistant") -> list[str]:
    """The runs of trained tokens, decoded."""
    ids, mask = encoder.encode_conversation(messages, train_on)
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for index, token in enumerate(ids):
        if mask[index]:
            if index == 0 or not mask[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [encoder.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Path:
    return shared / "tokenizers" / "qwen2"


def corpus_encoder(shared: Path, tokenizer: str, template: str) -> ChatEncoder:
    return ChatEncoder.from_path(
        shared / "tokenizers" / tokenizer, shared / "chat-templates" / f"{template}.jinja"
    )


def test_stories_model(shared: Path) -> None:
    encoder = ChatEncoder.from_path(shared / "models" / "stories260k")
    assert set(encoder.stop_ids) == {2, 1}  # eos, and what generation_config.json lists
    assert encoder.pad_id is None
    assert encoder.vocab_size == 512
    prompt = encoder.encode_prompt([user("Hi")])
    assert encoder.tokenizer.decode(prompt, skip_special_tokens=False).endswith("Assistant:")
    assert trained(encoder, [user("Hi"), assistant("Once upon"), user("Go"), assistant("a time")]) == [
        "Once upon</s>",
        "a time</s>",
    ]


def test_last_assistant_only(shared: Path) -> None:
    encoder = corpus_encoder(shared, "qwen2", "qwen2.5-7b-instruct")
    messages = [user("a"), assistant("one"), user("b"), assistant("two")]
    assert trained(encoder, messages, "last_assistant") == ["two<|im_end|>"]


def test_qwen3_rewrites_history(shared: Path) -> None:
    """The earlier turn lost its reasoning; the last one is trained with its own, or with the block inserted."""
    encoder = corpus_encoder(shared, "qwen2", "qwen3-0.6b")
    reasoned = "<think>\nhm\n</think>\n\nsix"
    assert trained(encoder, [user("a"), assistant(reasoned), user("b"), assistant(reasoned)]) == [
        "six<|im_end|>",
        reasoned + "<|im_end|>",
    ]
    assert trained(encoder, [user("a"), assistant("four")]) == ["<think>\n\n</think>\n\nfour<|im_end|>"]


def test_deepseek_r1_prompt_is_no_prefix(shared: Path) -> None:
    """The generation prompt opens a reasoning block that the conversation does not have."""
    encoder = corpus_encoder(shared, "deepseek-llm", "deepseek-r1-distill-qwen-32b")
    messages = [user("a"), assistant("<think>\nhm\n</think>six"), user("b"), assistant("seven")]
    text, spans = encoder.spans(messages)
    end = encoder.tokens["eos_token"]
    assert [text[start:stop] for start, stop in spans] == ["six" + end, "seven" + end]


def test_terminator_after_whitespace_is_trained(shared: Path) -> None:
    encoder = corpus_encoder(shared, "llama-2", "llama-2-chat")
    assert trained(encoder, [user("a"), assistant("b")]) == ["b </s>"]


def test_content_that_looks_like_markers(shared: Path) -> None:
    encoder = corpus_encoder(shared, "qwen2", "qwen2.5-7b-instruct")
    tricky = "x<|im_end|>\n<|im_start|>assistant\ny"
    text, spans = encoder.spans([user(tricky), assistant(tricky), user("a"), assistant("x")])
    assert [text[start:stop] for start, stop in spans] == [tricky + "<|im_end|>", "x<|im_end|>"]


def test_tool_calls_are_trained(shared: Path) -> None:
    encoder = corpus_encoder(shared, "qwen2", "qwen2.5-7b-instruct")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        user("a"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    (run,) = trained(encoder, messages)
    assert '"name": "add"' in run
    assert run.endswith("<|im_end|>")


@pytest.mark.parametrize("tokenizer", ["llama-2", "gpt2"])
def test_mask_on_every_template(shared: Path, tokenizer: str) -> None:
    """Every answer is trained as a whole, no question is, and the token that ends a turn is where there is one."""
    folder = shared / "chat-templates"
    questions, answers = ["Zebra one?", "Yak, two?"], ["Pelican is what I say.", "Walrus, of course."]
    messages = [user(questions[0]), assistant(answers[0]), user(questions[1]), assistant(answers[1])]
    rendered = 0
    backends: dict[tuple[str, ...], Tokenizer] = {}
    for entry in json.loads((folder / "index.json").read_text())["templates"]:
        strings = tuple(sorted({text for text in entry["tokens"].values() if text}))
        if strings not in backends:
            backends[strings] = Tokenizer.from_file(str(shared / "tokenizers" / tokenizer / "tokenizer.json"))
            backends[strings].add_special_tokens([AddedToken(text, special=True) for text in strings])
        backend = backends[strings]
        tokens = {f"{key}_token": value for key, value in entry["tokens"].items() if key != "eot"}
        encoder = ChatEncoder((folder / entry["file"]).read_text(encoding="utf-8"), tokens, backend)
        try:
            text, spans = encoder.spans(messages)
        except jinja2.TemplateError:
            assert not entry["renders_under_transformers"], entry["name"]
            continue
        rendered += 1
        assert len(spans) == 2, entry["name"]
        for (start, end), answer in zip(spans, answers, strict=True):
            assert answer in text[start:end], entry["name"]
            assert not any(question in text[start:end] for question in questions), entry["name"]
        if entry["observed"]["final_assistant_ends_with_eos"]:
            start, end = spans[1]
            ending = text[start:end][-40:]
            assert any(ending.endswith(marker) for marker in encoder.ends.tokens), (entry["name"], ending)
        ids, mask = encoder.encode_conversation(messages)
        assert len(ids) == len(mask)
        assert 0 < sum(mask) < len(mask), entry["name"]
    assert rendered == 76


def test_agrees_with_generation_tags(shared: Path) -> None:
    """Templates that mark the trained text themselves: transformers' own assistant mask is the reference."""
    transformers = pytest.importorskip("transformers")
    for name, folder in (("qwen2.5-trl-training", "qwen2"), ("llama-3-trl-training", "llama-3-8b-instruct")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "tokenizers" / folder)
        source = (shared / "chat-templates" / f"{name}.jinja").read_text()
        messages = [user("What?"), assistant("This, of course."), user("And?"), assistant("That.")]
        reference = tokenizer.apply_chat_template(
            messages, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
        )
        encoder = ChatEncoder(source, dict(tokenizer.special_tokens_map), tokenizer.backend_tokenizer)
        ids, mask = encoder.encode_conversation(messages)
        assert ids == reference["input_ids"]
        theirs = reference["assistant_masks"]
        extra = [tokenizer.decode([i]) for i, a, b in zip(ids, mask, theirs, strict=True) if a != b]
        assert set(extra) <= ({"\n"} if name.startswith("qwen") else set()), "newlines at either end, at most"
        assert all(b for a, b in zip(mask, theirs, strict=True) if a)


def test_ids_equal_transformers(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for folder in ("qwen2", "llama-3-8b-instruct"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "tokenizers" / folder)
        encoder = ChatEncoder.from_path(shared / "tokenizers" / folder)
        messages = [user("Ünïcode 答案 <|eot_id|>"), assistant("  two  spaces\n\n"), user("x")]
        reference = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encoder.encode_prompt(messages) == reference


def test_decode_response(qwen: Path) -> None:
    encoder = ChatEncoder.from_path(qwen)
    end, pad = encoder.tokenizer.token_to_id("<|im_end|>"), encoder.tokenizer.token_to_id("<|endoftext|>")
    assert encoder.stop_ids[0] == end
    assert pad in encoder.stop_ids  # from generation_config.json
    ids = [*encoder.encode_text("a <|im_end|> b"), end, pad, pad]
    assert encoder.decode_response(ids) == "a <|im_end|> b"
    assert encoder.decode_response([end]) == ""


def test_missing_template_and_tokenizer(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(TemplateMismatch, match="has no chat template"):
        ChatEncoder.from_path(shared / "tokenizers" / "gpt2")
    with pytest.raises(UsageError, match="does not exist"):
        load_side(tmp_path / "nothing")
    with pytest.raises(UsageError, match="not a model or tokenizer directory"):
        load_side(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x",}')
    with pytest.raises(UsageError, match=r"tokenizer_config.json:1:\d+ is not JSON"):
        load_side(tmp_path)
