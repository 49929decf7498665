"""What rows share passes once: hidden states and gradients of the rows one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhfctl.models.head import token_logprobs
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors
from rlhfctl.models.packing import plan_packs, split_over_ranks
from rlhfctl.models.shared_prefix import Sharing, common_prefix, pack_shared, worth_sharing
from tests.models.test_packed_forward import CONFIGS, one_by_one, two_copies

PREFIXES = ([5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30] * 12)
RESTS = ((4, 4, 4), (9, 2, 5), (3,))


def rows():
    """Three samples of one length, three of different ones, one sample alone; every row's tokens are trained."""
    generator = torch.Generator().manual_seed(2)
    ids, prompts = [], []
    for prefix, lengths in zip(PREFIXES, RESTS, strict=True):
        for length in lengths:
            ids.append(prefix + torch.randint(0, 97, (length,), generator=generator).tolist())
            prompts.append(len(prefix))
    return ids, prompts


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_of_the_rows_one_by_one(name):
    ours, plain = two_copies(CONFIGS[name])
    ids, prompts = rows()
    sharing = Sharing(
        ids, [range(prompt, len(row)) for prompt, row in zip(prompts, ids, strict=True)], prompts
    )
    batch = sharing.pack(range(len(ids)), bucket=8)
    # 7 + 12, 3 + 16 and 12 + 3 tokens, filled up: without sharing 67.
    assert batch.ids.shape[1] == 56
    found, _ = token_logprobs(hidden_at_predictors(backbone(ours), batch), head_weight(ours), batch.targets)
    weights = torch.rand(len(found), generator=torch.Generator().manual_seed(3))
    (found * weights).sum().backward()

    expected = []
    for row in batch.rows:
        expected.append(one_by_one(plain, [ids[row]])[prompts[row] - 1 :])
    wanted = torch.cat(expected)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    (wanted * weights).sum().backward()
    for (place, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=place)


def test_reading_inside_the_shared_part():
    """A place in the prefix is read once for each row that asks, in the hidden states that all of them have."""
    ids = [[3, 4, 5, 6], [3, 4, 7]]
    batch = pack_shared([(2, [0, 1])], ids, [[1, 3], [0, 2]], 0)
    assert batch.ids.tolist() == [[3, 4, 5, 6, 7]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.predictors.tolist() == [1, 3, 0, 4]
    assert batch.targets.tolist() == [4, 6, 3, 7]


def test_common_prefix_leaves_every_row_a_token():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 4, 5]]) == 1
    assert common_prefix([[1], [1]]) == 0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=24),
    st.integers(8, 60),
    st.integers(1, 4),
)
def test_plans_hold_every_row_once_within_the_budget(drawn, budget, world):
    """Prompts of 1, 4, 7 and 10 tokens; rows in any order; ranks of close loads."""
    prompts = [1 + 3 * which for which, _ in drawn]
    ids = [[which] * (1 + 3 * which) + [9] * length for which, length in drawn]
    sharing = Sharing(ids, [[]] * len(ids), prompts)
    ranks = [sharing.plan(range(len(ids)), budget, rank, world) for rank in range(world)]
    assert sorted(row for packs in ranks for members in packs for row in members) == list(range(len(ids)))
    for packs in ranks:
        for members in packs:
            batch = sharing.pack(members)
            assert sorted(batch.rows) == sorted(members)
            assert batch.ids.shape[1] <= budget or len(members) == 1


def test_a_group_is_parted_by_the_budget_and_for_the_ranks():
    """16 samples of one prompt of 10 tokens, 5 tokens each: 10 + 5 n pass together."""
    sharing = Sharing([[1] * 10 + [2] * 5] * 16, [[]] * 16, [10] * 16)
    assert [len(unit) for unit in sharing.units(range(16), 30, 16)] == [4, 4, 4, 4]
    assert [len(unit) for unit in sharing.units(range(16), 29, 16)] == [3, 3, 3, 3, 3, 1]
    assert [len(unit) for unit in sharing.units(range(16), 1000, 3)] == [3, 3, 3, 3, 3, 1]
    for rank in (0, 1):
        assert [len(members) for members in sharing.plan(range(16), 1000, rank, 2)] == [8]


def test_which_prefix_is_worth_sharing():
    assert worth_sharing(25, [125, 30])
    assert not worth_sharing(24, [124, 124])
    assert not worth_sharing(25, [125])


def test_rows_of_different_prompts_are_planned_as_ever():
    lengths = [5, 9, 9, 3, 12, 7, 7, 1]
    ids = [[place] * length for place, length in enumerate(lengths)]
    sharing = Sharing(ids, [[]] * 8, [1] * 8)
    for world in (1, 2, 3):
        for rank, mine in enumerate(split_over_ranks(range(8), lengths, world)):
            assert sharing.plan([3, 1, 0, 2, 7, 6, 5, 4], 20, rank, world) == plan_packs(mine, lengths, 20)
