import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfctl.data.load import SourceReport
from rlhfctl.trainers.order import BatchOrder


def report(start, stop, weight=1.0):
    return SourceReport("f.jsonl", "qa", stop - start, start, stop, weight)


def order(rows=10, batch=4, shuffle=True, seed=1, dropped=()):
    places = [None if index in dropped else index for index in range(rows)]
    return BatchOrder([report(0, rows)], places, seed, batch, shuffle)


def test_unshuffled_batches_run_across_epochs():
    plain = order(rows=5, batch=3, shuffle=False)
    assert [plain.batch(step) for step in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_a_batch_larger_than_the_data_takes_several_epochs():
    assert order(rows=2, batch=5, shuffle=False).batch(1) == [1, 0, 1, 0, 1]


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 20))
def test_a_batch_depends_on_its_step_alone(rows, batch, step):
    fresh, walked = order(rows, batch), order(rows, batch)
    for earlier in range(step):
        walked.batch(earlier)
    assert fresh.batch(step) == walked.batch(step)
    assert len(fresh.batch(step)) == batch


def test_every_epoch_visits_every_row_once_in_another_order():
    shuffled = order(rows=12, batch=12)
    first, second = shuffled.batch(0), shuffled.batch(1)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_dropped_rows_never_appear():
    kept = order(rows=6, batch=4, dropped=(1, 4))
    assert sorted(kept.batch(0)) == [0, 2, 3, 5]


def test_steps_for_epochs_rounds_up():
    assert order(rows=10, batch=4).steps_for(1) == 3
    assert order(rows=10, batch=4).steps_for(2) == 5


def test_an_epoch_whose_few_rows_are_all_left_out_is_passed_over():
    rows = [index if index % 5 == 0 else None for index in range(20)]
    scarce = BatchOrder([report(0, 20, weight=0.05)], rows, 1, 3, True)
    assert {row for step in range(20) for row in scarce.batch(step)} <= {0, 5, 10, 15}
    assert [] in scarce.epochs
    assert BatchOrder([report(0, 20, weight=0.05)], rows, 1, 3, True).steps_for(1) == 1


def test_nothing_usable_is_an_error():
    with pytest.raises(ValueError, match="no usable row"):
        order(rows=3, dropped=(0, 1, 2)).batch(0)
