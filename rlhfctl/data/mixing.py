"""The order in which an epoch visits the samples of several weighted sources.

A source of weight w gives each of its n rows floor(w) times an epoch, and a fresh random choice of rows for
the fraction that is left, so that w is the expected number of passes over it.
"""

import random

from rlhfctl.data.load import SourceReport


def epoch_order(reports: list[SourceReport], seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """Indices into the loaded samples for one epoch: a function of (sources, seed, epoch) alone, so that a
    resumed run rebuilds it. Never empty: at least one row of each source is taken."""
    # A string seed is hashed with SHA-512, the same on every machine and unlike for neighbouring epochs.
    rng = random.Random(f"rlhfctl data {seed} {epoch}")
    order: list[int] = []
    for report in reports:
        rows = range(report.start, report.stop)
        whole = int(report.weight)
        part = round((report.weight - whole) * len(rows))
        if not whole and not part:
            part = 1
        order += list(rows) * whole + sorted(rng.sample(rows, part))
    if shuffle:
        rng.shuffle(order)
    return order
