from hypothesis import given
from hypothesis import strategies as st

from rlhfctl.models.attention import PackedLayout
from rlhfctl.models.packing import pack, plan_packs, split_over_ranks

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def test_pack_by_hand():
    batch = pack([2, 0], [[10, 11, 12], [7], [20, 21]], [[2], [], [1]])
    assert batch.ids.tolist() == [[20, 21, 10, 11, 12]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.predictors.tolist() == [0, 3]
    assert batch.targets.tolist() == [21, 12]
    assert batch.counts == [1, 1]
    assert batch.layout.runs == [(0, 1, 2), (2, 1, 3)]


def test_equal_neighbours_share_a_run():
    assert PackedLayout.of_lengths([4, 4, 4, 2, 4]).runs == [(0, 3, 4), (12, 1, 2), (14, 1, 4)]


@given(LENGTHS, st.integers(1, 64))
def test_packs_hold_every_row_once_within_the_budget(lengths, budget):
    packs = plan_packs(range(len(lengths)), lengths, budget)
    assert sorted(row for members in packs for row in members) == list(range(len(lengths)))
    for members in packs:
        assert len(members) == 1 or sum(lengths[row] for row in members) <= budget


@given(LENGTHS, st.integers(1, 6))
def test_ranks_hold_every_row_once_and_are_balanced(lengths, world):
    shares = split_over_ranks(range(len(lengths)), lengths, world)
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
