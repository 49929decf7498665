"""Reward models in training and as saved: the head rule, and scores that transformers and peft compute alike."""

import json
import warnings

import pytest
import tiny_sizes
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from rlhfctl.errors import Refused
from rlhfctl.models.packing import pack_reading
from rlhfctl.models.reward_export import RewardFacts, export_reward_model
from rlhfctl.models.reward_model import load_reward_model
from rlhfctl.models.reward_training import load_for_training, scores_at
from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.sections import Lora, Policy

CPU = torch.device("cpu")
SIZES = tiny_sizes.SIZES | {"vocab_size": 53, "max_position_embeddings": 64, "pad_token_id": 0}
ROWS = [[3, 9, 4, 7, 2], [5, 8, 1], [6, 6, 6, 6, 6, 6, 6, 11]]


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("policy")
    write_model(directory)  # a tokenizer to copy
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    return directory


@pytest.fixture
def reward_dir(tmp_path, policy_dir):
    torch.manual_seed(1)
    directory = tmp_path / "start"
    write_model(directory)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(directory)
    return directory


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory, **keys):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | keys))


def last_scores(model, rows=ROWS):
    return scores_at(model, pack_reading(range(len(rows)), rows, [[len(r) - 1] for r in rows])).tolist()


def start(path, head="auto", **keys):
    return load_for_training(Policy(path=str(path), dtype="float32", **keys), head, CPU, 3)


def saved(model, path, directory, read="last_token", merge=False, **keys):
    facts = RewardFacts("pairwise", read, 0, "\n", 0.25, 1.5)
    export_reward_model(model, Policy(path=str(path), **keys), facts, directory, merge)
    return directory


# The head rule


def test_created_where_the_checkpoint_has_none(policy_dir):
    model, told = start(policy_dir)
    assert told == "new: zeros"
    assert last_scores(model) == [0.0, 0.0, 0.0]
    random, said = start(policy_dir, "normal")
    assert "random" in said
    assert torch.equal(random.score.weight, start(policy_dir, "normal")[0].score.weight)
    assert random.score.weight.std().item() == pytest.approx(32**-0.5, rel=0.4)


def test_replaced_by_the_checkpoint_s(reward_dir):
    model, told = start(reward_dir)
    assert told == "the checkpoint's score.weight"
    assert torch.equal(model.score.weight, load_file(reward_dir / "model.safetensors")["score.weight"])


def test_a_bias_is_left_out_and_told(reward_dir):
    edit(reward_dir, lambda tensors: tensors.update({"score.bias": torch.tensor([3.0])}))
    model, told = start(reward_dir)
    assert told == "the checkpoint's score.weight without its bias, which training has no place for"
    assert model.score.bias is None


def test_replaced_by_one_under_another_prefix(reward_dir, policy_dir):
    head = load_file(reward_dir / "model.safetensors")["score.weight"]
    edit(reward_dir, lambda tensors: tensors.update({"value_head.weight": tensors.pop("score.weight")}))
    configure(reward_dir, value_head_prefix="value_head", architectures=["RewardModel"], mean=7.0, std=3.0)
    model, told = start(reward_dir)
    assert told == "the checkpoint's value_head.weight"
    assert torch.equal(model.score.weight, head)
    out = saved(model, reward_dir, reward_dir.parent / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["value_head_prefix"], config["mean"], config["std"]) == ("score", 0.25, 1.5)
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_kept_new_where_the_recipe_asks_for_it(reward_dir):
    model, told = start(reward_dir, "zero")
    assert (told, bool(model.score.weight.any())) == ("new: zeros", False)
    edit(reward_dir, lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))
    assert start(reward_dir, "zero")[1] == "new: zeros"
    with pytest.raises(Refused, match=r"shape \[2, 32\]"):
        start(reward_dir)


def test_an_incomplete_checkpoint_is_refused(reward_dir):
    edit(reward_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(Refused, match=r"lacks .*layers\.1\.mlp\.up_proj\.weight"):
        start(reward_dir)


def test_the_head_is_float32_and_trains_with_an_adapter_over_a_frozen_trunk(policy_dir):
    model, _ = load_for_training(
        Policy(path=str(policy_dir), dtype="bfloat16", lora=Lora(rank=2)), "normal", CPU, 0
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained
    assert all("lora_" in name for name in trained - {"score.weight"})
    assert len(trained) == 1 + 2 * 2 * 7
    assert model.score.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


# What is saved


def trained(path, **keys):
    model, _ = start(path, "normal", **keys)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("lora", [None, Lora(rank=3)])
def test_transformers_loads_it_without_new_weights_and_scores_alike(policy_dir, tmp_path, lora):
    model = trained(policy_dir, lora=lora)
    ours = last_scores(model)
    out = saved(model, policy_dir, tmp_path / "out", merge=True, lora=lora)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert plain.config.num_labels == 1
    assert plain.config.id2label == {0: "score"}
    assert plain.config.problem_type == "regression"
    assert plain.config.pad_token_id == 0
    longest = max(map(len, ROWS))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        theirs = plain.eval()(padded, attention_mask=(padded != 0).long()).logits[:, 0].tolist()
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert load_reward_model(str(out), torch.float32, CPU).score(ROWS, 9) == pytest.approx(ours, abs=1e-5)
    assert max(ours) - min(ours) > 0.05
    again, told = start(out)
    assert told == "the checkpoint's score.weight"
    assert last_scores(again) == pytest.approx(ours, abs=1e-5)


def test_an_adapter_with_its_head(policy_dir, tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    lora = Lora(rank=3, merge_final=False)
    model = trained(policy_dir, lora=lora)
    ours = last_scores(model)
    out = saved(model, policy_dir, tmp_path / "out", lora=lora)
    assert (out / "adapter_model.safetensors").stat().st_size < 40_000
    assert not (out / "model.safetensors").exists()
    assert load_reward_model(str(out), torch.float32, CPU).score(ROWS, 9) == pytest.approx(ours, abs=1e-5)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
    with torch.no_grad():
        scores = [float(theirs(input_ids=torch.tensor([row])).logits) for row in ROWS]
    assert scores == pytest.approx(ours, abs=1e-5)


def test_an_adapter_without_a_head_takes_its_base_s_or_is_refused(policy_dir, reward_dir, tmp_path):
    """The head of the base must not get lost, and no other one be invented."""
    for base in (policy_dir, reward_dir):
        lora = Lora(rank=3, merge_final=False)
        model, _ = start(base, lora=lora)
        out = saved(model, base, tmp_path / f"adapter of {base.name}", lora=lora)
        tensors = load_file(out / "adapter_model.safetensors")
        tensors.pop("base_model.model.score.weight")
        save_file(tensors, out / "adapter_model.safetensors")
        if base == reward_dir:
            expected = load_reward_model(str(reward_dir), torch.float32, CPU).score(ROWS, 99)
            found = load_reward_model(str(out), torch.float32, CPU).score(ROWS, 99)
            assert found == pytest.approx(expected, abs=1e-6)
        else:
            with pytest.raises(Refused, match=r"neither .* nor its base .* holds a reward head"):
                load_reward_model(str(out), torch.float32, CPU)


def test_an_adapter_of_another_model_is_refused(policy_dir, tmp_path):
    lora = Lora(rank=3, merge_final=False)
    model, _ = start(policy_dir, "normal", lora=lora)
    out = saved(model, policy_dir, tmp_path / "out", lora=lora)
    tensors = load_file(out / "adapter_model.safetensors")
    odd = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(odd, out / "adapter_model.safetensors")
    with pytest.raises(Refused, match=r"does not fit its base model: it holds .*layers\.7"):
        load_reward_model(str(out), torch.float32, CPU)


@pytest.mark.parametrize("read", ["token_sum", "step_end"])
def test_token_heads_are_token_classifiers(policy_dir, tmp_path, read):
    model = trained(policy_dir)
    out = saved(model, policy_dir, tmp_path / "out", read=read)
    plain, report = AutoModelForTokenClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        logits = [plain.eval()(torch.tensor([row])).logits[0, :, 0] for row in ROWS]
    places = [[1, 3], [2], [0, 4, 6]]
    join = torch.sum if read == "token_sum" else torch.min
    expected = [float(join(values[at])) for values, at in zip(logits, places, strict=True)]
    loaded = load_reward_model(str(out), torch.float32, CPU)
    assert loaded.read == read
    assert loaded.score(ROWS, 99, places) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="needs the places"):
        loaded.score(ROWS, 99)


def test_a_token_classifier_of_two_labels_gives_the_log_odds_of_right(tmp_path):
    torch.manual_seed(2)
    directory = tmp_path / "prm"
    plain = LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=2)).eval()
    torch.nn.init.normal_(plain.score.bias)
    plain.save_pretrained(directory)
    loaded = load_reward_model(str(directory), torch.float32, CPU)
    with torch.no_grad():
        logits = [plain(torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
    expected = [[float(row[i, 1] - row[i, 0]) for i in range(len(row))] for row in logits]
    found = loaded.at(ROWS, [range(len(row)) for row in ROWS], 99)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_padding_at_the_end_is_read_as_transformers_reads_it(reward_dir):
    """With a padding token that ends answers too, the token before it is read, in both."""
    plain = LlamaForSequenceClassification.from_pretrained(reward_dir).eval()
    rows = [[3, 9, 4, 0], [5, 0, 0], [7, 8, 2]]
    with torch.no_grad():
        expected = [float(plain(torch.tensor([row])).logits) for row in rows]
    found = load_reward_model(str(reward_dir), torch.float32, CPU).score(rows, 99)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_head_of_another_width_is_refused(reward_dir):
    edit(reward_dir, lambda tensors: tensors.update({"score.weight": torch.ones(1, 16)}))
    with pytest.raises(Refused, match="16 wide, the model 32"):
        load_reward_model(str(reward_dir), torch.float32, CPU)
    with pytest.raises(Refused, match="16 wide, the model 32"):
        start(reward_dir)


def test_mean_and_std_are_only_written_where_there_are_some(policy_dir, tmp_path):
    model, _ = start(policy_dir, "normal")
    export_reward_model(
        model,
        Policy(path=str(policy_dir)),
        RewardFacts("pairwise", "last_token", 0, "\n"),
        tmp_path / "a",
        False,
    )
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert "mean" not in config
    assert config["normalize_reward"] is False
    loaded = load_reward_model(str(tmp_path / "a"), torch.float32, CPU)
    assert (loaded.mean, loaded.std) == (0.0, 1.0)
