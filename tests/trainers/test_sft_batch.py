"""The global batch is the unit: how it is cut into packs changes neither loss nor gradient."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.models import attention, direct_gradient, head_tiles
from rlhfctl.models.load import prepare
from rlhfctl.recipe.sections import Optim
from rlhfctl.trainers.optimizer import Optimizer, clip_and_step
from rlhfctl.trainers.sft import train_batch

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
class Rows:
    ids: list
    trained: list
    lengths: list


@pytest.fixture(scope="module")
def model():
    attention.register()
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation=attention.NAME)
    return prepare(built, torch.device("cpu"))


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 53, (n,), generator=generator).tolist() for n in (9, 4, 17, 9, 30, 5, 12, 3)]
    return Rows(ids, [list(range(len(row) // 2, len(row))) for row in ids], [len(row) for row in ids])


def loss_and_gradients(model, rows, groups, budget):
    """groups: the rows of each rank; their gradients add up, as the all-reduce does."""
    trained = sum(len(rows.trained[row]) for group in groups for row in group)
    model.zero_grad()
    loss = sum(train_batch(model, rows, group, trained, budget) for group in groups)
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("groups", "budget"),
    [
        ([range(8)], 1),
        ([range(8)], 30),
        ([[0, 3, 5, 7], [1, 2, 4, 6]], 1000),
        ([[4], [0, 1, 2, 3, 5, 6, 7]], 20),
    ],
)
def test_splits_change_nothing(model, rows, groups, budget):
    expected_loss, expected = loss_and_gradients(model, rows, [range(8)], 1000)
    loss, gradients = loss_and_gradients(model, rows, groups, budget)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_loss_is_the_mean_over_all_trained_tokens(model, rows):
    loss, _ = loss_and_gradients(model, rows, [range(8)], 1000)
    total, count = 0.0, 0
    reference = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), attn_implementation="eager")
    reference.load_state_dict(model.state_dict())
    for ids, trained in zip(rows.ids, rows.trained, strict=True):
        with torch.no_grad():
            logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[index - 1, ids[index]]) for index in trained)
        count += len(trained)
    assert loss == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_learns_as_a_small_one(monkeypatch, rows, tied):
    """The head in tiles and gradients added in place: ten steps with the losses of the plain way."""

    def losses():
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIG)
        config.tie_word_embeddings = tied
        built = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
        model = prepare(built, torch.device("cpu"))
        optim = Optim(lr=1e-2, schedule="constant", warmup_ratio=0.0)
        optimizer = Optimizer(model.named_parameters(), optim, 1e-2, 10)
        trained, found = sum(len(row) for row in rows.trained), []
        for _ in range(10):
            found.append(train_batch(model, rows, list(range(8)), trained, 30, optimizer))
            clip_and_step([optimizer], 1.0)
        return found

    monkeypatch.setattr(direct_gradient, "allowed", lambda parameter: False)
    plain = losses()
    monkeypatch.undo()
    monkeypatch.setattr(head_tiles, "LARGE", 53)
    monkeypatch.setattr(head_tiles, "TILE", 20)
    assert losses() == pytest.approx(plain, abs=1e-5)
    assert plain[-1] < plain[0] - 1
