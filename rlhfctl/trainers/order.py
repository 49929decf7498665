"""Which rows make up step s: a function of the recipe and s alone, so that a resumed run rebuilds it."""

import math

from rlhfctl.data.load import SourceReport
from rlhfctl.data.mixing import epoch_order


class BatchOrder:
    """An endless stream of epochs, cut into batches.

    rows: for each loaded sample its row in the trainer's list, or None where it was dropped (too long).
    """

    def __init__(
        self, reports: list[SourceReport], rows: list[int | None], seed: int, batch_size: int, shuffle: bool
    ) -> None:
        self.reports = reports
        self.rows = rows
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.epoch_starts = [0]
        self.epochs: list[list[int]] = []

    def _extend(self) -> None:
        if all(row is None for row in self.rows):
            raise ValueError("there is no usable row")
        order = epoch_order(self.reports, self.seed, len(self.epochs), self.shuffle)
        # Nothing, where a small weight takes few rows and all of them were dropped.
        kept = [row for index in order if (row := self.rows[index]) is not None]
        self.epochs.append(kept)
        self.epoch_starts.append(self.epoch_starts[-1] + len(kept))

    def batch(self, step: int) -> list[int]:
        """Rows of 0-based step `step`; batches run across the ends of epochs."""
        return self.rows_between(step * self.batch_size, (step + 1) * self.batch_size)

    def rows_between(self, start: int, end: int) -> list[int]:
        """Rows at the places start to end - 1 of the stream."""
        while self.epoch_starts[-1] < end:
            self._extend()
        rows: list[int] = []
        for epoch, first in zip(self.epochs, self.epoch_starts, strict=False):
            if first < end and first + len(epoch) > start:
                rows += epoch[max(0, start - first) : end - first]
        return rows

    def steps_for(self, epochs: int) -> int:
        """Steps that cover `epochs` passes, the last one filled up from the next epoch; at least one."""
        while len(self.epochs) < epochs:
            self._extend()
        return max(1, math.ceil(self.epoch_starts[epochs] / self.batch_size))
