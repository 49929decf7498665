"""OREO's training step: equal for every split of the batch, equal to a slow one, and exact in what is switched off."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.data.encode_offline import OfflineRow
from rlhfctl.models import attention
from rlhfctl.models.load import backbone, prepare
from rlhfctl.models.value import Critic
from rlhfctl.recipe.oreo_sections import OfflineReasoning
from rlhfctl.trainers.oreo import train_batch

CONFIG = LlamaConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@dataclass
class Frozen:
    """A reference without the loading."""

    model: torch.nn.Module

    @property
    def weight(self):
        return self.model.lm_head.weight

    def hidden(self, batch):
        with torch.no_grad():
            out = backbone(self.model)(input_ids=batch.ids, position_ids=batch.positions, layout=batch.layout)
            return out.last_hidden_state[0][batch.predictors]


@dataclass
class Rows:
    rows: list
    ids: list
    trained: list
    lengths: list


def build(seed):
    attention.register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation=attention.NAME)
    return prepare(model, torch.device("cpu"))


@pytest.fixture(scope="module")
def models():
    critic = Critic(backbone(build(2)), 32)
    critic.head.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    return build(0), critic, Frozen(build(1).requires_grad_(False))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 53, (n,), generator=generator).tolist() for n in (9, 4, 17, 9, 30, 5, 12, 3)]
    trained = [list(range(len(row) // 2, len(row))) for row in ids]
    rows = [
        OfflineRow(str(i), row, [], [place // 3 for place in range(len(read))], float(i % 2), i % 2 == 1)
        for i, (row, read) in enumerate(zip(ids, trained, strict=True))
    ]
    return Rows(rows, ids, trained, [len(row) for row in ids])


def run(models, data, groups, budget, **keys):
    """groups: the rows of each rank; sums and gradients add up, as the all-reduce does."""
    policy, critic, reference = models
    policy.zero_grad()
    critic.zero_grad()
    algorithm = OfflineReasoning(beta=0.3, alpha=0.2, **keys)
    total: dict[str, float] = {}
    for group in groups:
        for name, value in train_batch(
            policy, critic, reference, data, list(group), 8, algorithm, True, False, budget
        ).items():
            total[name] = total.get(name, 0.0) + value
    gradients = {
        f"{owner}.{name}": p.grad.clone()
        for owner, model in (("policy", policy), ("critic", critic))
        for name, p in model.named_parameters()
    }
    return total, gradients


@pytest.mark.parametrize("level", ["token", "step", "response"])
@pytest.mark.parametrize(("groups", "budget"), [([range(8)], 1), ([[0, 3, 5, 7], [1, 2, 4, 6]], 1000)])
def test_every_split_of_the_batch_is_the_same_step(models, data, level, groups, budget):
    whole, expected = run(models, data, [range(8)], 10_000, level=level)
    sums, gradients = run(models, data, groups, budget, level=level)
    assert sums == pytest.approx(whole, rel=1e-4, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4)


def test_weights_of_steps_reach_both_losses_and_survive_a_split(models, data):
    keys = {"step_weights": [1.0, 5.0, 0.5]}
    plain, _ = run(models, data, [range(8)], 10_000)
    whole, expected = run(models, data, [range(8)], 10_000, **keys)
    sums, gradients = run(models, data, [[0, 3, 5, 7], [1, 2, 4, 6]], 40, **keys)
    assert sums == pytest.approx(whole, rel=1e-4, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4)
    for name in ("policy_loss", "value_loss"):
        assert abs(whole[name] / plain[name] - 1) > 1e-3
    assert whole["kl_loss"] == plain["kl_loss"]


def slow(models, data, level, beta, alpha):
    """Row by row with the whole softmax, loops over units, from the formulas."""
    policy, critic, reference = models
    policy_loss = value_loss = 0.0
    for row, ids, trained in zip(data.rows, data.ids, data.trained, strict=True):

        def states(trunk, ids=ids, trained=trained):
            layout = attention.PackedLayout.of_lengths([len(ids)])
            positions = torch.arange(len(ids))[None]
            out = trunk(input_ids=torch.tensor([ids]), position_ids=positions, layout=layout)
            return out.last_hidden_state[0][[place - 1 for place in trained]]

        ours = (states(backbone(policy)) @ policy.lm_head.weight.t()).log_softmax(1)
        with torch.no_grad():
            theirs = (states(backbone(reference.model)) @ reference.weight.t()).log_softmax(1)
        values = (states(critic.trunk) @ critic.head.weight.t())[:, 0]
        taken = [ids[place] for place in trained]
        ratio = [ours[t, token] - theirs[t, token] for t, token in enumerate(taken)]
        kl = (ours.exp() * (ours - theirs)).sum(1).mean()
        count = len(taken)
        number = {"token": list(range(count)), "step": row.steps, "response": [0] * count}[level]
        units = [[t for t in range(count) if number[t] == unit] for unit in sorted(set(number))]
        parts = []
        for unit in units:
            later = sum((ratio[t].detach() for t in range(unit[-1] + 1, count)), torch.zeros(()))
            own = sum(ratio[t] for t in unit)
            parts.append((values[unit[0]].detach() - row.reward + beta * own + beta * later) ** 2)
        policy_loss = policy_loss + (sum(parts) / len(parts) + alpha * kl) / 8
        read = [unit[0] for unit in units] if level == "step" else range(count)
        errors = [(values[t] - row.reward + beta * sum(r.detach() for r in ratio[t:])) ** 2 for t in read]
        value_loss = value_loss + sum(errors) / len(errors) / 8
    return policy_loss, value_loss


@pytest.mark.parametrize("level", ["token", "step", "response"])
def test_it_is_the_slow_implementation(models, data, level):
    sums, gradients = run(models, data, [range(8)], 40, level=level)
    policy, critic, _ = models
    policy.zero_grad()
    critic.zero_grad()
    policy_loss, value_loss = slow(models, data, level, 0.3, 0.2)
    (policy_loss + value_loss).backward()
    assert sums["policy_loss"] + 0.2 * sums["kl_loss"] == pytest.approx(policy_loss.item(), rel=1e-4)
    assert sums["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    for owner, model in (("policy", policy), ("critic", critic)):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[f"{owner}.{name}"], parameter.grad, atol=3e-5, rtol=1e-3)


def test_value_warm_up_leaves_the_policy_alone(models, data):
    policy, critic, reference = models
    policy.zero_grad()
    critic.zero_grad()
    algorithm = OfflineReasoning()
    sums = train_batch(policy, critic, Frozen(policy), data, list(range(8)), 8, algorithm, False, False, 64)
    still = train_batch(policy, critic, reference, data, list(range(8)), 8, algorithm, False, True, 64)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert critic.head.weight.grad.abs().sum() > 0
    assert still == pytest.approx(sums, abs=1e-4)
