"""Policy, reference and value model on one copy of the weights: the same numbers as with copies of their own."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhfctl.data.encode_offline import OfflineRow
from rlhfctl.models.load import backbone, config_of, load_causal_lm
from rlhfctl.models.lora import VALUE, adapter_parameters, add_lora, own_parameters
from rlhfctl.models.value import load_critic
from rlhfctl.recipe.oreo_sections import OfflineReasoning
from rlhfctl.recipe.sections import Lora, Policy, ValueModel
from rlhfctl.trainers.oreo import train_batch
from rlhfctl.trainers.oreo_data import Reference

CPU = torch.device("cpu")
LORA = Lora(rank=4, alpha=8)
VALUE_LORA = Lora(rank=2, alpha=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 53, (n,), generator=generator).tolist() for n in (9, 4, 17, 9, 30, 5)]
    trained = [list(range(len(row) // 2, len(row))) for row in ids]
    rows = [
        OfflineRow(str(i), row, [], [place // 3 for place in range(len(read))], float(i % 2), i % 2 == 1)
        for i, (row, read) in enumerate(zip(ids, trained, strict=True))
    ]
    return SimpleNamespace(rows=rows, ids=ids, trained=trained, lengths=[len(row) for row in ids])


def build(base, copies, **keys):
    """(policy, critic, reference) with all adapters and the head away from zero, the same in both forms."""
    spec = Policy(path=str(base), lora=LORA, **keys)
    policy = load_causal_lm(spec, CPU, 0)
    add_lora(policy, LORA, 0)
    of_critic = spec.model_copy(update={"lora": None}) if copies else spec
    critic = load_critic(ValueModel(lora=VALUE_LORA), of_critic, policy, CPU, 0, None)
    recipe = SimpleNamespace(reference=str(base) if copies else None, policy=spec, seed=0)
    reference = Reference(SimpleNamespace(device=CPU), recipe, policy)
    generator = torch.Generator().manual_seed(5)
    critic.head.weight.data.normal_(generator=generator)
    for name, parameter in [*own_parameters(policy), *value_parameters(critic).items()]:
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy, critic, reference


def value_parameters(critic):
    """In one order, whatever holds them."""
    if critic.adapter is not None:
        return dict(sorted((name.split("layers")[1], p) for name, p in critic.adapter.items()))
    named = adapter_parameters(critic.trunk, "default")
    return dict(sorted((name.split("layers")[1], p) for name, p in named.items()))


def step(base, data, copies, budget=40, **keys):
    policy, critic, reference = build(base, copies, **keys)
    sums = train_batch(
        policy, critic, reference, data, list(range(6)), 6, OfflineReasoning(alpha=0.1), True, False, budget
    )
    policy_grads = {name: p.grad for name, p in own_parameters(policy) if p.requires_grad}
    value_grads = [p.grad for p in value_parameters(critic).values()]
    return sums, policy_grads, [*value_grads, critic.head.weight.grad]


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}, {"quantization": "int8"}])
def test_losses_and_gradients_are_those_of_separate_copies(base, data, keys):
    """With checkpointing, forward passes are run again in the backward pass: under the adapter that made them."""
    other = {} if keys == {"gradient_checkpointing": True} else keys
    mine, theirs = step(base, data, False, **keys), step(base, data, True, **other)
    for name, value in theirs[0].items():
        assert mine[0][name] == pytest.approx(value, abs=1e-6, rel=1e-5), name
    assert mine[1].keys() == theirs[1].keys()
    assert all(float(grad.abs().max()) > 0 for grad in (*mine[1].values(), *mine[2]))
    for name, grad in theirs[1].items():
        torch.testing.assert_close(mine[1][name], grad, atol=1e-5, rtol=1e-5, msg=name)
    for one, two in zip(mine[2], theirs[2], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_memory_holds_one_backbone(base):
    policy, critic, reference = build(base, copies=False)
    size = sum(p.numel() for p in load_causal_lm(Policy(path=str(base)), CPU, 0).parameters())
    held = [*policy.parameters(), *critic.parameters(), *reference.model.parameters()]
    distinct = {p.data_ptr(): p.numel() for p in held}
    adapters = {p.data_ptr(): p.numel() for p in held if p.requires_grad}
    assert sum(distinct.values()) == size + sum(adapters.values())
    assert sum(adapters.values()) < size / 3
    apart = build(base, copies=True)
    copies = {
        p.data_ptr(): p.numel() for model in (apart[0], apart[1], apart[2].model) for p in model.parameters()
    }
    assert sum(copies.values()) > 2.5 * size


def test_each_optimizer_gets_its_own_adapter(base):
    policy, critic, _ = build(base, copies=False)
    policys = {id(p) for _, p in own_parameters(policy) if p.requires_grad}
    critics = {id(p) for p in critic.parameters() if p.requires_grad}
    assert not policys & critics
    assert policys | critics == {id(p) for p in policy.parameters() if p.requires_grad} | {
        id(critic.head.weight)
    }
    assert {id(p) for p in adapter_parameters(policy, VALUE).values()} < critics
    assert critic.head.weight.shape[1] == config_of(policy).hidden_size
    assert critic.backbone is backbone(policy)
