"""Scores through the bridge are those of the reward model's own pipeline, whatever template the policy has."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

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
