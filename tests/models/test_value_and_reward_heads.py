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
