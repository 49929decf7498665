"""Rows that begin alike are scored as each of them alone is, and their beginning passes once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhfctl.models.load import backbone
from rlhfctl.models.reward_model import RewardModel
from rlhfctl.models.shared_prefix import worth_sharing
from rlhfctl.models.shared_reading import groups_alike, packs_to_read
from tests.models.test_packed_forward import CONFIGS, two_copies

HEADER = [1, 2, 3]  # what a template puts before every question
FIRST, SECOND = [*HEADER, 10, 11, 12, 13, 14, 15, 16], [*HEADER, 20, 21]
ROWS = [[*FIRST, 30], [*SECOND, 31, 32], [*FIRST, 30, 33, 34], [40, 41], [*FIRST, 35, 36], [*SECOND, 37]]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("budget", [256, 16, 1])
def test_scores_are_those_of_each_row_alone(name, budget):
    """Read at the last token, inside what is shared, and where one row ends and another goes on."""
    ours, plain = two_copies(CONFIGS[name])
    head = torch.randn(1, ours.config.hidden_size, generator=torch.Generator().manual_seed(3))
    places = [[2, len(row) - 1] if row[:3] == HEADER else [0, 1] for row in ROWS]
    found = RewardModel(backbone(ours), head, 0.0, 1.0, bias=0.25).at(ROWS, places, budget)
    for row, at, values in zip(ROWS, places, found, strict=True):
        with torch.no_grad():
            hidden = backbone(plain)(torch.tensor([row])).last_hidden_state[0]
        wanted = (hidden[at] @ head[0] + 0.25).tolist()
        assert values == pytest.approx(wanted, abs=1e-5)


def test_questions_pass_once_and_their_header_not_at_their_cost():
    """Two questions share a header too: as the common beginning it would cost the first one's samples theirs."""
    assert groups_alike(ROWS, 256) == [(10, [0, 2, 4]), (5, [1, 5]), (0, [3])]
    samples = [[*FIRST, *([answer] * 8)] for answer in range(30, 34)]
    assert groups_alike(samples, 256) == [(10, [0, 1, 2, 3])]
    (pack,) = packs_to_read(ROWS, [[0]] * len(ROWS), 256)
    assert pack.ids.shape[1] == (10 + 1 + 3 + 2) + (5 + 2 + 1) + 2  # 38 one by one


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=20),
    st.integers(1, 40),
)
def test_every_row_once_within_the_budget_and_never_more_tokens(ids, budget):
    groups = groups_alike(ids, budget)
    assert sorted(row for _, rows in groups for row in rows) == list(range(len(ids)))
    for shared, rows in groups:
        lengths = [len(ids[row]) for row in rows]
        assert all(ids[row][:shared] == ids[rows[0]][:shared] and len(ids[row]) > shared for row in rows)
        if len(rows) > 1:
            assert worth_sharing(shared, lengths)
            assert sum(lengths) - (len(rows) - 1) * shared <= budget
        else:
            assert shared == 0
    packs = list(packs_to_read(ids, [[len(row) - 1] for row in ids], budget))
    longest = max(len(row) for row in ids)
    assert all(pack.ids.shape[1] <= max(budget, longest) for pack in packs)
