"""The value fitted to outcomes: its loss by hand, and that it learns what a token says of the end."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhfctl.models.load import load_causal_lm
from rlhfctl.recipe.oreo_sections import ValueFit
from rlhfctl.recipe.sections import Policy
from rlhfctl.trainers.value_command import fit_value
from rlhfctl.trainers.value_fit import Order, Row, fresh_value, loss_of, prefixes, train_batch


@pytest.fixture(scope="module")
def policy(chains: Path) -> nn.Module:
    spec = Policy(from_config=str(chains / "model"), tokenizer=str(chains / "model"))
    return load_causal_lm(spec, torch.device("cpu"), 1)


def rows() -> list[Row]:
    """Prompt 1 2; the response is 3, x, 4 and ends right where x is 5."""
    return [Row([1, 2, 3, x, 4], 2, x == 5) for x in (5, 6) for _ in range(8)]


@pytest.mark.parametrize("head", ["scalar", "token_sum"])
def test_an_untrained_value_is_the_coin_and_a_trained_one_waits_for_the_token(
    policy: nn.Module, head: str
) -> None:
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    ids = [row.ids for row in rows()]
    fresh = fresh_value(policy, head)
    assert loss_of(fresh, [0, 9], rows()).item() == pytest.approx(8 * math.log(2))
    said: list[str] = []
    model = fit_value(policy, rows(), ValueFit(steps=60, batch_size=16, lr=3e-3, head=head), 0, said.append)
    right, wrong = model.at([ids[0], ids[-1]], [[1, 2, 3, 4]] * 2, 4096, [2, 2])
    assert right[:2] == pytest.approx(wrong[:2], abs=1e-5)  # nothing is known yet
    assert abs(right[1]) < 1.0
    assert min(right[2:]) > 2.0
    assert max(wrong[2:]) < -2.0
    # Two of the four prefixes cannot be told apart: log 2 each, the others nearly 0.
    assert loss_of(model, list(range(16)), rows()).item() / 64 == pytest.approx(math.log(2) / 2, abs=0.05)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())
    assert said[-1].startswith("step 60/60  loss ")


def test_the_loss_is_a_mean_over_the_prefixes_of_the_whole_batch(policy: nn.Module) -> None:
    """In one pack, in several, or over two ranks: one gradient. Rows of different lengths tell means of means apart."""
    data = [Row([1, 2, 3], 2, True), Row([1, 2, 3, 4, 5, 6], 2, False), Row([1, 2, 3, 4], 3, True)]
    members = [0, 1, 2]
    total = prefixes(members, data)
    assert total == 2 + 5 + 2
    gradients, losses = [], []
    for parts, budget in (([members], 64), ([members], 1), ([[0, 2], [1]], 64)):
        model = fresh_value(policy, "token_sum")
        model.token_sum.token.data.normal_(generator=torch.Generator().manual_seed(3))
        losses.append(sum(train_batch(model, part, data, total, budget) for part in parts))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for gradient in gradients[1:]:
        # Of a gradient of up to 60, which is summed in another order.
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=5e-5)


def test_every_epoch_takes_each_row_once_in_another_order() -> None:
    order = Order(5, 2, seed=1)
    stream = [row for step in range(5) for row in order.batch(step)]
    assert sorted(stream[:5]) == sorted(stream[5:]) == list(range(5))
    assert stream[:5] != stream[5:]
    assert Order(5, 2, seed=1).batch(3) == stream[6:8]  # a function of the step alone
