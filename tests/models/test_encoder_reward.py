"""Reward models over encoders, as transformers computes them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhfctl.errors import Refused
from rlhfctl.models.encoder_reward import EncoderRewardModel
from rlhfctl.models.reward_model import load_reward_model

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "num_labels": 1,
}
ROWS = [[3, 9, 4, 7, 2], [5, 8, 6], [6, 6, 6, 6, 6, 6, 6, 11]]
KINDS = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}


def make(directory, kind, **keys):
    torch.manual_seed(4)
    config, model = KINDS[kind]
    built = model(config(**{**SIZES, **keys}))
    for name, parameter in built.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(parameter)
    built.save_pretrained(directory)
    return built.eval()


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_scores_are_those_of_the_classifier(tmp_path, kind, budget):
    plain = make(tmp_path, kind)
    with torch.no_grad():
        expected = [float(plain(torch.tensor([row])).logits) for row in ROWS]
    loaded = load_reward_model(str(tmp_path), torch.float32, CPU)
    assert isinstance(loaded, EncoderRewardModel)
    assert loaded.score(ROWS, budget) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3
    assert loaded.score([], budget) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"classifier.weight": torch.zeros(1, 32)}), "all zeros"),
        (lambda t: t.update({"classifier.weight": torch.full((1, 32), float("nan"))}), "NaN"),
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"), "lacks bert.encoder.layer.1"),
        (lambda t: t.pop("classifier.weight"), "lacks classifier.weight"),
        (lambda t: [t.pop(name) for name in ("classifier.weight", "classifier.bias")], "no reward head"),
    ],
)
def test_what_cannot_score_is_refused(tmp_path, change, said):
    make(tmp_path, "bert")
    edit(tmp_path, change)
    with pytest.raises(Refused, match=said):
        load_reward_model(str(tmp_path), torch.float32, CPU)


def test_several_labels_are_refused(tmp_path):
    make(tmp_path, "bert", num_labels=3)
    with pytest.raises(Refused, match=r"shape \[3, 32\]"):
        load_reward_model(str(tmp_path), torch.float32, CPU)
