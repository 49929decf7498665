"""The value-head rule on checkpoints made here: created, replaced by the checkpoint's, kept; never silently random."""

import json
import shutil

import pytest
import tiny_sizes
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhfctl.errors import Refused, Unable
from rlhfctl.models.load import load_causal_lm
from rlhfctl.models.packing import pack
from rlhfctl.models.reward_model import load_reward_model
from rlhfctl.models.value import load_critic
from rlhfctl.recipe.sections import Policy, ValueModel

CPU = torch.device("cpu")
SIZES = tiny_sizes.SIZES | {"vocab_size": 53, "max_position_embeddings": 64, "pad_token_id": 0}


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("policy")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    return directory


@pytest.fixture
def reward_dir(tmp_path):
    torch.manual_seed(1)
    directory = tmp_path / "rm"
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(directory)
    return directory


def edit(directory, change):
    """Rewrite the checkpoint's tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory, **keys):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | keys))


def critic(policy_dir, reward_model=None, **keys):
    policy = Policy(path=str(policy_dir))
    model = load_causal_lm(policy, CPU, 0)
    return model, load_critic(ValueModel(**keys), policy, model, CPU, 0, reward_model and str(reward_model))


ROWS = [[3, 9, 4, 7, 2], [5, 8, 1], [6, 6, 6, 6, 6, 6, 6, 11]]


def test_a_model_of_the_hub_is_read_where_its_files_are(policy_dir, reward_dir, tmp_path, monkeypatch):
    """The cache of the hub, as a download leaves it."""
    import huggingface_hub.constants

    cached = tmp_path / "cache/models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    shutil.copytree(reward_dir, cached / "snapshots/abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model, there = (
        load_reward_model("some/model", torch.float32, CPU),
        load_reward_model(str(reward_dir), torch.float32, CPU),
    )
    assert torch.equal(model.head.weight, there.head.weight)
    _, value = critic(policy_dir, "some/model", init="reward_model")
    assert torch.equal(value.head.weight, there.head.weight)
    with pytest.raises(
        Unable, match="no/such is no directory here and did not come from the hub: HF_HUB_OFFLINE is set"
    ):
        load_reward_model("no/such", torch.float32, CPU)


def test_scores_equal_transformers_own_head(reward_dir):
    plain = LlamaForSequenceClassification.from_pretrained(reward_dir).eval()
    with torch.no_grad():
        expected = [float(plain(torch.tensor([row])).logits) for row in ROWS]
    scores = load_reward_model(str(reward_dir), torch.float32, CPU).score(ROWS, budget=8)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 1e-3


def test_a_head_under_another_prefix_with_mean_and_std(reward_dir):
    plain = load_reward_model(str(reward_dir), torch.float32, CPU).score(ROWS, 100)
    edit(reward_dir, lambda tensors: tensors.update({"value_head.weight": tensors.pop("score.weight")}))
    configure(reward_dir, value_head_prefix="value_head", normalize_reward=True, mean=0.5, std=2.0)
    scores = load_reward_model(str(reward_dir), torch.float32, CPU).score(ROWS, 100)
    assert scores == pytest.approx([(score - 0.5) / 2 for score in plain], abs=1e-6)


def test_scoring_without_a_head_is_refused_with_the_names(policy_dir):
    with pytest.raises(Refused, match=r"no reward head: looked for score\.weight.*found .*lm_head\.weight"):
        load_reward_model(str(policy_dir), torch.float32, CPU)


def score_of(directory):
    return load_reward_model(str(directory), torch.float32, CPU).score(ROWS, 100)


def test_the_head_comes_from_the_files_that_transformers_reads(reward_dir):
    """Leftovers of other saves lie beside them, before and after in the alphabet."""
    expected = score_of(reward_dir)
    tensors = load_file(reward_dir / "model.safetensors")
    stale = {name: -tensor for name, tensor in tensors.items()}
    save_file(stale, reward_dir / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    save_file({"v_head.weight": torch.ones(1, 32)}, reward_dir / "adapter_old.safetensors")
    save_file({"score.weight": torch.zeros(1, 32)}, reward_dir / "z.safetensors")
    assert score_of(reward_dir) == expected
    plain = LlamaForSequenceClassification.from_pretrained(reward_dir).eval()
    with torch.no_grad():
        theirs = [float(plain(torch.tensor([row])).logits) for row in ROWS]
    assert expected == pytest.approx(theirs, abs=1e-5)


def in_shards(directory, *shards):
    """The checkpoint in one file for each set of tensors, under an index."""
    (directory / "model.safetensors").unlink()
    files = [f"model-{place:05}-of-{len(shards):05}.safetensors" for place in range(1, len(shards) + 1)]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, directory / file, metadata={"format": "pt"})
    where = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_head_and_bias_may_lie_in_different_shards(reward_dir):
    expected = score_of(reward_dir)
    tensors = load_file(reward_dir / "model.safetensors")
    bias = {"score.bias": torch.tensor([3.0])}
    in_shards(reward_dir, {"score.weight": tensors.pop("score.weight")}, tensors, bias)
    save_file({"score.weight": torch.zeros(1, 32)}, reward_dir / "model-00001-of-00007.safetensors")
    assert score_of(reward_dir) == pytest.approx([score + 3 for score in expected], abs=1e-6)


def test_a_head_beside_its_backbone(reward_dir):
    expected = score_of(reward_dir)
    head = {}
    edit(reward_dir, lambda tensors: head.update({"v_head.weight": tensors.pop("score.weight")}))
    save_file(head, reward_dir / "head of somebody.safetensors")
    with pytest.raises(Refused, match="no reward head"):  # transformers would not read it either
        score_of(reward_dir)
    save_file(head, reward_dir / "value_head.safetensors")
    assert score_of(reward_dir) == expected


def test_two_different_heads_are_refused_unless_one_is_named(reward_dir):
    expected = score_of(reward_dir)
    twin = load_file(reward_dir / "model.safetensors")["score.weight"].clone()
    edit(
        reward_dir, lambda tensors: tensors.update({"v_head.weight": twin, "head.weight": torch.ones(53, 32)})
    )
    assert score_of(reward_dir) == expected
    edit(reward_dir, lambda tensors: tensors.update({"v_head.weight": -twin}))
    with pytest.raises(Refused, match=r"two different heads, .*:score\.weight and .*:v_head\.weight"):
        score_of(reward_dir)
    configure(reward_dir, value_head_prefix="v_head")
    assert score_of(reward_dir) == pytest.approx([-score for score in expected], abs=1e-6)
    save_file({"v_head.weight": twin}, reward_dir / "value_head.safetensors")
    with pytest.raises(Refused, match=r"two different heads, .*value_head\.safetensors:v_head\.weight"):
        score_of(reward_dir)


def test_a_head_of_another_form_is_refused_rather_than_replaced(policy_dir, reward_dir):
    expected = score_of(reward_dir)
    edit(reward_dir, lambda tensors: tensors.update({"v_head.summary.weight": tensors.pop("score.weight")}))
    with pytest.raises(Refused, match=r"looked for score\.weight.*, found v_head\.summary\.weight; name one"):
        score_of(reward_dir)
    with pytest.raises(Refused, match=r"found v_head\.summary\.weight"):
        critic(policy_dir, reward_dir, init="reward_model")
    assert not critic(policy_dir, reward_dir, init="reward_model", head="zero")[1].head.weight.any()
    configure(reward_dir, value_head_prefix="v_head.summary")
    assert score_of(reward_dir) == expected


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_names_behind_a_wrapper_s_prefix_are_refused(reward_dir, prefix):
    """transformers would fill the whole backbone with random numbers."""
    tensors = load_file(reward_dir / "model.safetensors")
    save_file({prefix + name: t for name, t in tensors.items()}, reward_dir / "model.safetensors")
    with pytest.raises(Refused):
        score_of(reward_dir)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (torch.zeros(1, 32), "all zeros"),
        (torch.ones(2, 32), r"shape \[2, 32\]"),
        (torch.full((1, 32), float("nan")), "NaN"),
    ],
)
def test_unusable_heads_are_refused(reward_dir, head, message):
    edit(reward_dir, lambda tensors: tensors.update({"score.weight": head}))
    with pytest.raises(Refused, match=message):
        load_reward_model(str(reward_dir), torch.float32, CPU)


@pytest.mark.parametrize("keys", [{}, {"mean": 0.0, "std": 0.0}, {"mean": float("inf"), "std": 1.0}])
def test_unusable_normalisation_is_refused(reward_dir, keys):
    configure(reward_dir, normalize_reward=True, **keys)
    with pytest.raises(Refused, match="not usable"):
        load_reward_model(str(reward_dir), torch.float32, CPU)


def test_missing_weights_are_refused(reward_dir, policy_dir, tmp_path):
    edit(reward_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(Refused, match=r"lacks .*layers\.1\.mlp\.up_proj\.weight.*random"):
        load_reward_model(str(reward_dir), torch.float32, CPU)


def test_a_critic_from_the_policy_starts_at_zero(policy_dir):
    model, made = critic(policy_dir)
    batch = pack([0], [[3, 9, 4, 7, 2]], [range(2, 5)])
    assert made(batch, model.base_model).tolist() == [0.0, 0.0, 0.0]
    mine, theirs = made.trunk.embed_tokens.weight, model.base_model.embed_tokens.weight
    assert torch.equal(mine, theirs)
    assert mine.data_ptr() != theirs.data_ptr()  # a copy: training one must not move the other


def test_a_critic_from_the_reward_model_takes_its_head_and_trunk(policy_dir, reward_dir):
    _, made = critic(policy_dir, reward_dir, init="reward_model")
    tensors = load_file(reward_dir / "model.safetensors")
    assert torch.equal(made.head.weight, tensors["score.weight"])
    assert torch.equal(made.trunk.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    _, zero = critic(policy_dir, reward_dir, init="reward_model", head="zero")
    assert not zero.head.weight.any()


def test_values_are_read_where_the_token_is_predicted(policy_dir):
    """V(s_t) of the token at index t comes from the hidden state at t - 1."""
    model, made = critic(policy_dir, shared_trunk=True, head="normal")
    row = [3, 9, 4, 7, 2]
    values = made(pack([0], [row], [[2, 4]]), model.base_model)
    hidden = model.base_model(
        input_ids=torch.tensor([row]),
        position_ids=torch.arange(5)[None],
        use_cache=False,
        layout=pack([0], [row], [[]]).layout,
    ).last_hidden_state[0]
    torch.testing.assert_close(values, (hidden @ made.head.weight.t())[[1, 3], 0], atol=1e-6, rtol=0)


def test_init_reward_model_without_one_is_refused(policy_dir):
    with pytest.raises(Refused, match="no reward source of kind model"):
        critic(policy_dir, init="reward_model")
