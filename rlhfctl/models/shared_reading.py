"""Rows that a reward model reads, laid in packs where those that begin alike pass that beginning once.

Answers to one question, whoever asks: samples of one step, or the requests of several clients. Rows in alphabetical
order have the neighbours that they share most with, so groups are made by one look along it.
"""

from collections.abc import Iterator, Sequence

import torch

from rlhfctl.models.packing import Pack, plan_packs
from rlhfctl.models.shared_prefix import common_prefix, pack_shared, worth_sharing

Group = tuple[int, list[int]]  # (tokens that pass once, rows), as pack_shared wants them


def groups_alike(ids: Sequence[Sequence[int]], budget: int) -> list[Group]:
    """Every row of ids once; groups of more than one have at most `budget` tokens.

    A row joins its neighbours where that saves tokens: it may share less with them than they do with each other.
    """
    groups: list[Group] = []
    tokens = 0  # of the last group
    for row in sorted(range(len(ids)), key=lambda row: (list(ids[row]), row)):
        if groups:
            rows = groups[-1][1]
            less = common_prefix([ids[rows[0]], ids[row]])  # in this order those between share no less
            together = sum(len(ids[other]) for other in (*rows, row)) - len(rows) * less
            lengths = [len(ids[other]) for other in (*rows, row)]
            if together <= min(budget, tokens + len(ids[row]) - 1) and worth_sharing(less, lengths):
                groups[-1] = (less, [*rows, row])
                tokens = together
                continue
        groups.append((0, [row]))
        tokens = len(ids[row])
    return groups


def packs_to_read(
    ids: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    budget: int,
    device: torch.device | str = "cpu",
    bucket: int = 1,
) -> Iterator[Pack]:
    """Packs of at most `budget` tokens (a longer row has its own), read at the token indices places[i] of row i."""
    groups = groups_alike(ids, budget)
    costs = [sum(len(ids[row]) - shared for row in rows) + shared for shared, rows in groups]
    for members in plan_packs(range(len(groups)), costs, budget):
        yield pack_shared([groups[member] for member in members], ids, places, 0, device, bucket)
