"""Hand numbers for per-token rewards. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import rewards_to_tokens


@pytest.fixture(name="m")
def module() -> ModuleType:
    return rewards_to_tokens


def doubles(*values: float | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_numbers(m: ModuleType) -> None:
    # kl_coef .1. Row 1: -.1 * (1, 2, -3) + (.5, 0, 0) + 7 at the last. Row 2 ends after its first token.
    found = m.token_rewards(
        doubles(7, -2),
        doubles([1, 1, 1], [1, 0, 0]),
        doubles([1, 2, -3], [4, math.nan, 9]),
        0.1,
        doubles([0.5, 0, 0], [0, 0, 0]),
    )
    assert_close(found, doubles([0.4, -0.2, 7.3], [-2.4, 0, 0]), rtol=0, atol=1e-14)


def test_the_score_stands_on_the_last_token_of_the_policy(m: ModuleType) -> None:
    # Observation tokens between and behind: the last masked token is at 3, in the second row at 0.
    found = m.token_rewards(doubles(5, 6), doubles([1, 0, 0, 1, 0], [1, 0, 0, 0, 0]))
    assert found.tolist() == [[0, 0, 0, 5, 0], [6, 0, 0, 0, 0]]


def test_nothing_is_lost_and_inputs_are_left_alone(m: ModuleType) -> None:
    scores, mask, kl, dense = doubles(2), doubles([1, 1]), doubles([1, 1]), doubles([3, 4])
    found = m.token_rewards(scores, mask, kl, 0.5, dense)
    assert found.sum() == 2 - 0.5 * 2 + 7
    assert (scores.tolist(), kl.tolist(), dense.tolist()) == ([2], [[1, 1]], [[3, 4]])


def test_refusals(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="no token: its score has no place"):
        m.token_rewards(doubles(1, 1), doubles([1, 0], [0, 0]))
    with pytest.raises(ValueError, match="1 rewards stand outside the response mask"):
        m.token_rewards(doubles(1), doubles([1, 0]), token_reward=doubles([0, 1]))
