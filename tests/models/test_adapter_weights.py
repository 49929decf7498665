"""Adapters of other programs: as peft computes with them, or refused; no weight of their file is left out."""

import warnings

import pytest
import tiny_sizes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhfctl.errors import Refused
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors, load_causal_lm
from rlhfctl.models.merged import merged_weights
from rlhfctl.models.packing import pack_reading
from rlhfctl.models.reward_model import load_reward_model
from rlhfctl.recipe.sections import Policy

CPU = torch.device("cpu")
SIZES = tiny_sizes.SIZES | {"vocab_size": 53, "max_position_embeddings": 64, "pad_token_id": 0}
ROWS = [[3, 9, 4, 7, 2], [5, 8, 1], [6, 6, 6, 6, 6, 6, 6, 11]]
FIRST = "model.layers.0.self_attn.q_proj"  # a name that the layer has in the whole model alone
EQUAL = {
    "embedding": {"modules_to_save": ["score", "embed_tokens"]},
    "norms": {"modules_to_save": ["score", "input_layernorm", "norm"]},
    "blocks": {"modules_to_save": ["score", "mlp"]},
    "every bias": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only"},
    "biases of the adapters": {"lora_bias": True},
    "low-rank embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "ranks of their own": {"rank_pattern": {FIRST: 2}},
    "factors of their own": {"alpha_pattern": {FIRST: 64}},
    "names by a pattern": {"target_modules": r"model\.layers\.\d\.self_attn\.(q|v)_proj"},
    "whole names": {"target_modules": [FIRST]},
    "one layer": {"layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By whether the head is the embedding: a decoder with biases whose matrices are far from zero."""
    made = {}
    for tied in (False, True):
        torch.manual_seed(3)
        kind, config = (LlamaForCausalLM, LlamaConfig) if tied else (Qwen2ForCausalLM, Qwen2Config)
        model = kind(config(**SIZES | {"tie_word_embeddings": tied}))
        spread(model.parameters(), 0.1)
        made[tied] = tmp_path_factory.mktemp("base")
        model.save_pretrained(made[tied])
    return made


def spread(parameters, std):
    for parameter in parameters:
        parameter.data.add_(torch.randn_like(parameter) * std)


def adapter(base, directory, task, **keys):
    """What peft trains and writes, every trained weight moved; read again by peft."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"task_type": task, "r": 4, "target_modules": ["q_proj", "v_proj"]} | keys)
        model = get_peft_model(base(), config)
        spread((p for p in model.parameters() if p.requires_grad), 0.3)
        model.save_pretrained(directory)
        return PeftModel.from_pretrained(base(), directory).eval()


def scorer(base, directory, kind=AutoModelForSequenceClassification, task="SEQ_CLS", labels=1, **keys):
    return adapter(lambda: kind.from_pretrained(base, num_labels=labels), directory, task, **keys)


@torch.no_grad()
def logits(model):
    return [model(torch.tensor([row])).logits[0] for row in ROWS]


def edit(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", EQUAL)
def test_a_reward_adapter_scores_as_with_peft(bases, tmp_path, name):
    theirs = [float(score) for score in logits(scorer(bases[False], tmp_path, **EQUAL[name]))]
    ours = load_reward_model(str(tmp_path), torch.float32, CPU).score(ROWS, 99)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    assert max(ours) - min(ours) > 0.05


@pytest.mark.parametrize("labels", [1, 2])
def test_an_adapter_of_a_token_classifier_is_read_at_every_token(bases, tmp_path, labels):
    kind = AutoModelForTokenClassification
    theirs = logits(scorer(bases[False], tmp_path, kind, "TOKEN_CLS", labels))
    loaded = load_reward_model(str(tmp_path), torch.float32, CPU)
    assert loaded.read == "step_end"
    found = loaded.at(ROWS, [range(len(row)) for row in ROWS], 99)
    for values, row in zip(found, theirs, strict=True):
        wanted = row[:, 0] if labels == 1 else row[:, 1] - row[:, 0]
        assert values == pytest.approx(wanted.tolist(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("indices", [[5, 9], {"embed_tokens": [5, 9]}])
def test_trained_tokens_are_refused_by_name(bases, tmp_path, indices):
    for tied in bases:
        scorer(bases[tied], tmp_path / str(tied), trainable_token_indices=indices)
        with pytest.raises(Refused, match=r"embed_tokens\.token_adapter\.trainable_tokens_delta"):
            load_reward_model(str(tmp_path / str(tied)), torch.float32, CPU)


def test_a_weight_without_a_place_and_a_place_without_a_weight_are_refused(bases, tmp_path):
    scorer(bases[False], tmp_path)
    odd = "base_model.model.model.layers.7.input_layernorm.weight"
    edit(tmp_path, lambda tensors: tensors.update({odd: torch.ones(32)}))
    with pytest.raises(Refused, match=r"holds model\.layers\.7\.input_layernorm\.weight, which is neither"):
        load_reward_model(str(tmp_path), torch.float32, CPU)
    lost = f"base_model.model.{FIRST}.lora_B.weight"
    edit(tmp_path, lambda tensors: (tensors.pop(odd), tensors.pop(lost)))
    with pytest.raises(Refused, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.lora_B"):
        load_reward_model(str(tmp_path), torch.float32, CPU)


def test_an_embedding_of_another_size_is_refused(bases, tmp_path):
    scorer(bases[False], tmp_path, modules_to_save=["score", "embed_tokens"])
    name = "base_model.model.model.embed_tokens.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(60, 32)}))
    with pytest.raises(Refused, match=r"embed_tokens\.weight is \[60, 32\] there, \[53, 32\] here"):
        load_reward_model(str(tmp_path), torch.float32, CPU)


def test_the_file_that_peft_reads_is_read(bases, tmp_path):
    theirs = [float(score) for score in logits(scorer(bases[False], tmp_path))]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    old = {name: -tensor for name, tensor in tensors.items()}
    for name in ("adapter_model_old.safetensors", "a.safetensors"):
        save_file(old, tmp_path / name)
    ours = load_reward_model(str(tmp_path), torch.float32, CPU).score(ROWS, 99)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


# Policies


def policy(base, directory, **keys):
    return adapter(lambda: AutoModelForCausalLM.from_pretrained(base), directory, "CAUSAL_LM", **keys)


@torch.no_grad()
def last_logits(model):
    places = [[len(row) - 1] for row in ROWS]
    return (
        hidden_at_predictors(backbone(model), pack_reading(range(3), ROWS, places)) @ head_weight(model).t()
    )


WHOLE = {"modules_to_save": ["embed_tokens", "lm_head", "input_layernorm"]}


@pytest.mark.parametrize("keys", [WHOLE, {"bias": "all"}, {"alpha_pattern": {FIRST: 64}}])
def test_a_policy_s_adapter_is_as_with_peft_and_merges_under_the_names_of_its_base(bases, tmp_path, keys):
    theirs = torch.stack([row[-1] for row in logits(policy(bases[False], tmp_path, **keys))])
    model = load_causal_lm(Policy(path=str(tmp_path), dtype="float32"), CPU, 0)
    torch.testing.assert_close(last_logits(model), theirs, rtol=1e-5, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(bases[False]).eval()
    names = {name for name, _ in merged.named_parameters()}
    found = dict(merged_weights(model))
    assert set(found) == names
    merged.load_state_dict(found)
    torch.testing.assert_close(torch.stack([row[-1] for row in logits(merged)]), theirs, rtol=1e-5, atol=1e-5)


def test_a_matrix_that_the_base_ties_to_another_is_refused(bases, tmp_path):
    policy(bases[True], tmp_path, modules_to_save=["embed_tokens"])
    with pytest.raises(
        Refused, match=r"model\.embed_tokens\.weight of its own, one matrix with lm_head\.weight"
    ):
        load_causal_lm(Policy(path=str(tmp_path)), CPU, 0)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"use_dora": True}, "a DoRA adapter"),
        ({"lora_bias": True}, "an adapter with a bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter on an embedding"),
    ],
)
def test_an_adapter_that_is_more_than_a_low_rank_sum_is_not_merged(bases, tmp_path, keys, kind):
    theirs = torch.stack([row[-1] for row in logits(policy(bases[False], tmp_path, **keys))])
    model = load_causal_lm(Policy(path=str(tmp_path), dtype="float32"), CPU, 0)
    torch.testing.assert_close(last_logits(model), theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(Refused, match=f"{kind} cannot be folded"):
        list(merged_weights(model))
