"""Redistribution by hand. The tests take the module, so that test_mutations.py can hand in a broken one."""

from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import redistribution
from rlhfctl.algorithms.rewards_to_tokens import token_rewards


@pytest.fixture(name="m")
def module() -> ModuleType:
    return redistribution


def doubles(*values: float | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_differences_telescope(m: ModuleType) -> None:
    # RM(x) = .5, then 2, 1.5, 3: what each token adds; together 3 - .5
    found = m.differences(doubles(0.5, 2, 1.5, 3))
    assert_close(found, doubles(1.5, -0.5, 1.5))
    assert float(found.sum()) == 2.5


def test_attention_is_a_mean_over_heads_with_the_sum_of_the_score(m: ModuleType) -> None:
    # Heads give the response .5 and .25 of their attention: means .1, .2, .075; over .375.
    heads = doubles([0.1, 0.3, 0.1], [0.1, 0.1, 0.05])
    found = m.attended(heads, -3.0)
    assert_close(found, doubles(-0.8, -1.6, -0.6))
    assert_close(found.sum(), doubles(-3.0).sum())


def test_the_total_is_kept(m: ModuleType) -> None:
    # Score 3 of which the tokens earned 2.5; .5 (RM(x)) is left. The second row was clipped to 1: -1.5 is left.
    scores, mask = doubles(3, 1), doubles([1, 1, 1], [1, 1, 0])
    tokens = doubles([1.5, -0.5, 1.5], [2, 0.5, 0])
    given, left = m.redistribute(tokens, scores, scores, mask, 1.0, True)
    assert_close(given, tokens)
    assert_close(left, doubles(0.5, -1.5))
    assert_close(token_rewards(left, mask, token_reward=given), doubles([1.5, -0.5, 2], [2, -1, 0]))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_sum_is_the_score_for_every_share(share: float) -> None:
    tokens, scores = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.7
    mask[:, 2] = True
    given, left = redistribution.redistribute(tokens * mask, scores, scores, mask, share, True)
    rewards = token_rewards(left, mask, token_reward=given)
    assert_close(rewards.sum(1), scores)
    if share == 0.0:
        assert_close(rewards, token_rewards(scores, mask))


def test_a_share(m: ModuleType) -> None:
    tokens, scores, mask = doubles([1, 3]), doubles(10), doubles([1, 1])
    none, rule = doubles(0), doubles(2)
    given, left = m.redistribute(tokens, scores, none, mask, 0.25, True)
    assert (given.tolist(), left.tolist()) == ([[0.25, 0.75]], [9.0])
    given, left = m.redistribute(tokens, scores, none, mask, 0.25, False)
    assert (given.tolist(), left.tolist()) == ([[0.25, 0.75]], [7.5])
    # 2 of the 10 are a rule's, which stay: 8 * .75 + 2.
    assert m.redistribute(tokens, scores, rule, mask, 0.25, False)[1].tolist() == [8.0]


def test_a_token_score_outside_the_mask_is_refused(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="1 rewards stand outside the response mask"):
        m.redistribute(doubles([1, 1]), doubles(1), doubles(0), doubles([1, 0]), 1.0, True)
