from collections import Counter

from rlhfctl.data.load import SourceReport
from rlhfctl.data.mixing import epoch_order


def report(start: int, stop: int, weight: float) -> SourceReport:
    return SourceReport("f", "qa", stop - start, start, stop, weight)


def test_weight_one_is_a_permutation() -> None:
    order = epoch_order([report(0, 50, 1.0)], seed=3, epoch=0)
    assert sorted(order) == list(range(50))
    assert order != list(range(50))


def test_weights_are_passes_over_the_source() -> None:
    counts = Counter(epoch_order([report(0, 10, 2.5), report(10, 30, 0.25)], seed=3, epoch=0))
    assert sorted(counts[i] for i in range(10)) == [2] * 5 + [3] * 5
    assert sum(counts[i] for i in range(10, 30)) == 5
    assert max(counts[i] for i in range(10, 30)) == 1


def test_a_tiny_weight_still_gives_a_row() -> None:
    assert len(epoch_order([report(0, 10, 0.001)], seed=3, epoch=0)) == 1


def test_fraction_is_drawn_afresh_each_epoch_and_the_same_again() -> None:
    sources = [report(0, 100, 0.5)]
    first, second = epoch_order(sources, 3, 0), epoch_order(sources, 3, 1)
    assert set(first) != set(second)
    assert first == epoch_order(sources, 3, 0)
    assert first != epoch_order(sources, 4, 0)
    assert first[:5] == PINNED


def test_without_shuffle_files_come_in_order() -> None:
    assert epoch_order([report(0, 3, 1.0), report(3, 5, 2.0)], 3, 0, shuffle=False) == [0, 1, 2, 3, 4, 3, 4]


PINNED = [
    65,
    91,
    8,
    51,
    83,
]  # the order must not change with the python version: a resume would read other rows
