"""PRIME by hand. The tests take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import implicit_prm


@pytest.fixture(name="m")
def module() -> ModuleType:
    return implicit_prm


def doubles(*values: float | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_process_rewards(m: ModuleType) -> None:
    logprobs = doubles([-1, -2, 9]).requires_grad_()
    found = m.process_rewards(logprobs, doubles([-3, -1, math.nan]), doubles([1, 1, 0]), 0.5)
    assert found.tolist() == [[1.0, -0.5, 0.0]]
    assert not found.requires_grad


def test_outcome_loss_and_its_gradient(m: ModuleType) -> None:
    # beta .5, log-ratios 2 and -4: scores 1 and -2, outcomes 1 and 1; over 4 samples of the whole batch.
    logprobs, reference = doubles(-3, -9).requires_grad_(), doubles(-5, -5).requires_grad_()
    loss, sums = m.outcome_loss(logprobs, reference, doubles(1, 1), 0.5, 4)
    sigmoid = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))]
    assert float(loss.detach()) == pytest.approx(-(math.log(sigmoid[0]) + math.log(sigmoid[1])) / 4)
    assert int(sums["right"]) == 1
    loss.backward()
    assert_close(logprobs.grad, doubles(*(-0.5 * (1 - s) / 4 for s in sigmoid)))
    assert reference.grad is None
    wrong, sums = m.outcome_loss(logprobs, reference, doubles(0, 1), 0.5, 1)
    assert float(wrong.detach()) == pytest.approx(-(math.log(1 - sigmoid[0]) + math.log(sigmoid[1])))
    assert int(sums["right"]) == 0


def test_advantages(m: ModuleType) -> None:
    # One prompt, n = 3. r: (1, 3), (4), (-1, 0): means 2, 4, -.5; of the others: 1.75, .75, 3.
    #   centred (-.75, 1.25), (3.25), (-4, -3); sums from t on (.5, 1.25), (3.25), (-7, -3)
    # R = 1, 0, .5: less the others' .25, .75, .5: .75, -.75, 0. coef 2.
    process = doubles([1, 3], [4, 99], [-1, 0])
    mask = doubles([1, 1], [1, 0], [1, 1])
    valid = torch.ones(3, dtype=torch.bool)
    found = m.prime_advantages(process, doubles(1, 0, 0.5), mask, 3, 2.0, 1.0, valid)
    assert_close(found, doubles([1.75, 3.25], [5.75, 0], [-14, -6]))
    # gamma .5: -.75 + .5 * 1.25 = -.125
    found = m.prime_advantages(process, doubles(1, 0, 0.5), mask, 3, 2.0, 0.5, valid)
    assert float(found[0, 0]) == pytest.approx(2 * -0.125 + 0.75)


def test_a_sample_without_a_score(m: ModuleType) -> None:
    # The first prompt has two samples left: 1 and 3, r 2 and 0. The second has one: no baseline.
    process, mask = doubles([2], [7], [0], [1], [1], [5]), torch.ones(6, 1)
    valid = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    found = m.prime_advantages(process, doubles(1, 9, 3, 1, 1, 1), mask, 3, 1.0, 1.0, valid)
    assert found.flatten().tolist() == [2 - 2, 0, -2 + 2, 0, 0, 0]
    found = m.prime_advantages(process, doubles(1, 9, 4, 1, 1, 1), mask, 3, 1.0, 1.0, valid)
    assert found.flatten().tolist() == [2 - 3, 0, -2 + 3, 0, 0, 0]


def test_groups(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="2 scores do not form groups of n = 1"):
        m.prime_advantages(
            torch.ones(2, 1), torch.ones(2), torch.ones(2, 1), 1, 1.0, 1.0, torch.ones(2).bool()
        )
