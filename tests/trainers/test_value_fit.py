"""The value fitted to outcomes: its loss by hand, and that it learns what a token says of the end."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhfctl.models.load import load_causal_lm
from rlhfctl.recipe.sections import Policy
from rlhfctl.trainers.value_fit import Row, ValueFit, fit_value, loss_of


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
    places = [list(range(row.prompt - 1, len(row.ids))) for row in rows()]
    fresh = fit_value(policy, rows(), ValueFit(steps=0, head=head), print)
    assert loss_of(fresh, [0, 9], rows(), ids, places).item() == pytest.approx(math.log(2))
    said: list[str] = []
    model = fit_value(policy, rows(), ValueFit(steps=60, batch_size=16, lr=3e-3, head=head), said.append)
    right, wrong = model.at([ids[0], ids[-1]], [[1, 2, 3, 4]] * 2, 4096, [2, 2])
    assert right[:2] == pytest.approx(wrong[:2], abs=1e-5)  # nothing is known yet
    assert abs(right[1]) < 1.0
    assert min(right[2:]) > 2.0
    assert max(wrong[2:]) < -2.0
    # Two of the four prefixes cannot be told apart: log 2 each, the others nearly 0.
    assert loss_of(model, list(range(16)), rows(), ids, places).item() == pytest.approx(
        math.log(2) / 2, abs=0.05
    )
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())
    assert said[-1].startswith("step 60/60  loss ")
