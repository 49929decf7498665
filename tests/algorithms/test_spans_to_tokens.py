"""Span scores on tokens by hand. They take the module, so that test_mutations.py can hand in a broken one."""

from types import ModuleType

import pytest
import torch

from rlhfctl.algorithms import spans_to_tokens

# "ab c" in four tokens: "a", "b ", half of "c", the rest of "c"; then a stop token.
OFFSETS = torch.tensor([[0, 1], [1, 3], [3, 3], [3, 4], [4, 4]])
EVERY = torch.ones(5)


@pytest.fixture(name="m")
def module() -> ModuleType:
    return spans_to_tokens


def on_tokens(m: ModuleType, spans: list, scores: list, mask=EVERY, spread: bool = False) -> list[float]:
    return m.spans_to_tokens(OFFSETS, torch.tensor(spans), torch.tensor(scores), mask, spread).tolist()


def test_a_step_is_rewarded_where_it_ends(m: ModuleType) -> None:
    # "ab" ends inside token 1, "c" with token 3; the stop token has no characters.
    assert on_tokens(m, [[0, 2], [3, 4]], [1.0, -2.0]) == [0, 1, 0, -2, 0]
    assert on_tokens(m, [[0, 1]], [3.0]) == [3, 0, 0, 0, 0]


def test_spans_of_one_token_add_up(m: ModuleType) -> None:
    assert on_tokens(m, [[1, 2], [2, 3]], [1.0, 4.0]) == [0, 5, 0, 0, 0]


def test_no_score_is_lost(m: ModuleType) -> None:
    # An empty span at 3 belongs to what was written before, at 0 to the first token; one past the end to the last one.
    assert on_tokens(m, [[3, 3], [0, 0], [3, 99]], [1.0, 2.0, 4.0]) == [2, 1, 0, 4, 0]
    assert on_tokens(m, [[3, 3], [0, 0]], [1.0, 2.0], spread=True) == [2, 1, 0, 0, 0]


def test_spread_over_the_tokens_that_share_characters(m: ModuleType) -> None:
    # "ab c": three tokens with characters; " c" shares token 1 and token 3.
    assert on_tokens(m, [[0, 4]], [6.0], spread=True) == [2, 2, 0, 2, 0]
    assert on_tokens(m, [[2, 4]], [1.0], spread=True) == [0, 0.5, 0, 0.5, 0]
    assert on_tokens(m, [[1, 3]], [1.0], spread=True) == [0, 1, 0, 0, 0]


def test_observations_take_nothing(m: ModuleType) -> None:
    # Token 1 is an observation: its score goes back to token 0. With token 0 observed too, on to the first one.
    assert on_tokens(m, [[0, 2]], [1.0], torch.tensor([1, 0, 1, 1, 1])) == [1, 0, 0, 0, 0]
    assert on_tokens(m, [[0, 2]], [1.0], torch.tensor([0, 0, 0, 1, 1])) == [0, 0, 0, 1, 0]
    assert on_tokens(m, [[0, 4]], [6.0], torch.tensor([1, 0, 0, 1, 1]), True) == [4, 0, 0, 2, 0]


def test_a_response_without_tokens_of_the_policy(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="no token of the policy"):
        on_tokens(m, [[0, 1]], [1.0], torch.zeros(5))
