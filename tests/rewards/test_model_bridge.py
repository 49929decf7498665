"""Scores through the bridge are those of the reward model's own pipeline, whatever template the policy has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from rlhfctl.recipe.sections import ModelSource, Template
from rlhfctl.rewards.model import ModelReward
from rlhfctl.templates.encode import ChatEncoder

SAMPLES = [
    ([{"role": "user", "content": "What is 2 + 2?"}], "It is 4."),
    (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        "Because.\n\nReally.",
    ),
    (
        [
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "Another, with \u00fcml\u00e4uts."},
        ],
        "T\u00fcrkis, das ist gr\u00fcn.",
    ),
]


def reward_model(shared: Path, tmp_path: Path, tokenizer: str, template: str) -> Path:
    """A tiny random Llama with a scalar head and a real tokenizer."""
    directory = tmp_path / f"rm-{tokenizer}"
    vocabulary = {"qwen2": 151936, "llama-3-8b-instruct": 128256}[tokenizer]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers" / tokenizer / file, directory / file)
    shutil.copyfile(shared / "chat-templates" / f"{template}.jinja", directory / "chat_template.jinja")
    return directory


@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [("llama-3-8b-instruct", "llama-3.1-8b-instruct"), ("qwen2", "qwen2.5-7b-instruct")],
)
def test_scores_do_not_depend_on_the_policy(
    shared: Path, tmp_path: Path, tokenizer: str, template: str
) -> None:
    directory = reward_model(shared, tmp_path, tokenizer, template)
    own = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    expected = []
    for messages, response in SAMPLES:
        chat = [*messages, {"role": "assistant", "content": response}]
        ids = own.apply_chat_template(chat, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            trunk = model.model(input_ids=ids).last_hidden_state
            expected.append(float(model.score(trunk)[0, -1, 0]))

    samples = [{"messages": messages, "response": response} for messages, response in SAMPLES]
    section = ModelSource(kind="model", path=str(directory), dtype="float32")
    policies = [
        ChatEncoder.from_path(shared / "tokenizers" / name, shared / "chat-templates" / f"{source}.jinja")
        for name, source in (("qwen2", "qwen2.5-7b-instruct"), ("llama-3-8b-instruct", "llama-3-8b-instruct"))
    ]
    for policy in policies:
        outcomes = ModelReward(section, policy, Template()).score(samples)
        assert [outcome.status for outcome in outcomes] == ["ok"] * len(samples)
        assert [outcome.score for outcome in outcomes] == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_scored_is_an_outcome(shared: Path, tmp_path: Path) -> None:
    directory = reward_model(shared, tmp_path, "qwen2", "gemma-2-2b-it")
    section = ModelSource(kind="model", path=str(directory), dtype="float32")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    samples = [
        {"messages": system, "response": "Because."},
        {"messages": system[1:], "response": "word " * 400},
        {"messages": [{"role": "user", "content": "word " * 400}], "response": "Because."},
    ]
    refused, too_long, cut = ModelReward(section).score(samples)
    assert refused.status == too_long.status == "error"
    assert "System role not supported" in str(refused.error)
    assert "the reward model takes 256" in str(too_long.error)
    assert cut.status == "ok"
    folded = ModelReward(section, None, Template(fold_system=True)).score(samples[:1])
    assert folded[0].status == "ok"


TRIMS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = [{"role": "user", "content": "2+2?"}]


def byte_model(directory: Path, read: str, template: str) -> ModelReward:
    """A token a character, so that places can be counted; random but for its seed."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text()) | {"reward_model": {"read": read}}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(template)
    policy = ChatEncoder(
        template.replace("[assistant]{% endif", "[assistant]<think>\n{% endif"), {}, tokenizer
    )
    return ModelReward(ModelSource(kind="model", path=str(directory)), policy)


def read_at(source: ModelReward, response: str, *ends: str) -> list[float]:
    """What the head says at the last character of each of `ends`, beginnings of the answer."""
    text = source.bridge.render(ASKED, response)
    start = text.index("[assistant]") + len("[assistant]")
    assert all(text.startswith(end, start) for end in ends)
    places = [start + len(end) - 1 for end in ends]
    return source.model.at([source.bridge.encode(ASKED, response).ids], [places], 512)[0]


def spans(source: ModelReward, response: str) -> list[tuple[int, int, float]]:
    [outcome] = source.score([{"id": "r", "messages": ASKED, "response": response, "label": None}])
    return [(span.start, span.end, span.score) for span in outcome.spans]


STEPS = [
    ("think", [(0, 5)], ["<think>\nthink"]),  # the letters of the tag that the prompt opened
    ("k>\nt", [(0, 2), (3, 4)], ["<think>\nk>", "<think>\nk>\nt"]),
    ("ab\nc ", [(0, 2), (3, 5)], ["<think>\nab", "<think>\nab\nc"]),
    (" <think>\nb ", [(0, 8), (9, 11)], ["<think>", "<think>\nb"]),
    ("\n", [(0, 1)], ["<think>"]),
    ("a</s>\nb", [(0, 5), (6, 7)], ["<think>\na</s>", "<think>\na</s>\nb"]),  # a control token that is text
]


def test_steps_are_read_where_the_policy_wrote_them(tmp_path: Path) -> None:
    source = byte_model(tmp_path, "step_end", TRIMS)
    for response, bounds, ends in STEPS:
        found = spans(source, response)
        assert [(low, high) for low, high, _ in found] == bounds
        assert [score for *_, score in found] == pytest.approx(read_at(source, response, *ends), abs=1e-6)


def test_tokens_are_read_where_the_policy_wrote_them(tmp_path: Path) -> None:
    source = byte_model(tmp_path, "token_sum", TRIMS)
    for response in ("think", "ab\nc ", "a</s>"):
        found = spans(source, response)
        assert [(low, high) for low, high, _ in found] == [(n, n + 1) for n in range(len(response))]
        ends = [f"<think>\n{response[:n]}" for n in (2, 3)]
        assert [score for *_, score in found[1:3]] == pytest.approx(
            read_at(source, response, *ends), abs=1e-6
        )
    [outcome] = source.score([{"id": "r", "messages": ASKED, "response": "", "label": None}])
    assert [(span.start, span.end, span.score) for span in outcome.spans] == [(0, 0, outcome.score)]
