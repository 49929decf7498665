"""The canary's two sides, without an engine: what it lets pass and what it stops."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.errors import RunFailed
from rlhfctl.models import attention
from rlhfctl.models.load import prepare
from rlhfctl.models.lora import add_lora
from rlhfctl.models.merged import merged_weights
from rlhfctl.recipe.sections import Lora
from rlhfctl.rollout.canary import LENGTH, canary_ids, compare, trainer_logprobs

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def policy():
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=attention.NAME)
    return prepare(model, torch.device("cpu"))


def plain_logits(policy, ids):
    """[T, V] by transformers' own attention, not ours."""
    policy.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            return policy(torch.tensor([ids]), use_cache=False).logits[0].float()
    finally:
        policy.config._attn_implementation = attention.NAME


def test_the_prompt_is_fixed_and_spread():
    ids = canary_ids(1000)
    assert ids == canary_ids(1000)
    assert len(ids) == LENGTH
    assert len(set(ids)) > LENGTH - 3
    assert all(0 <= token < 7 for token in canary_ids(7))


def test_the_trainers_side_is_the_models_own_distribution(policy):
    ids = canary_ids(61)
    rows = plain_logits(policy, ids).log_softmax(-1)
    wanted = rows[torch.arange(LENGTH - 1), torch.tensor(ids[1:])]
    torch.testing.assert_close(trainer_logprobs(policy, ids), wanted, atol=1e-5, rtol=0)


def test_a_difference_past_the_tolerance_stops_with_its_numbers(policy):
    ids = canary_ids(61)
    right = trainer_logprobs(policy, ids).tolist()
    assert compare(policy, ids, right, 3) == 0.0
    assert compare(policy, ids, [right[0] + 5e-5, *right[1:]], 3) == pytest.approx(5e-5, rel=0.05)
    wrong = [*right[:6], right[6] - 0.5, *right[7:]]
    with pytest.raises(
        RunFailed, match=rf"step 3: .* token 7 .*{wrong[6]:.6f}.*{right[6]:.6f}.* 0\.5, 0\.0001"
    ):
        compare(policy, ids, wrong, 3)
    with pytest.raises(RunFailed, match="token 3"):
        compare(policy, ids, [*right[:2], float("nan"), *right[3:]], 3)


def test_merged_weights_are_the_adapted_model_and_leave_it_alone(policy):
    base = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    add_lora(policy, Lora(rank=4, alpha=12.0), 1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    merged = dict(merged_weights(policy))
    assert set(merged) == set(base)
    name = "model.layers.1.mlp.up_proj"
    a, b = before[f"{name}.lora_A.default.weight"], before[f"{name}.lora_B.default.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 3.0 * b @ a)
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
