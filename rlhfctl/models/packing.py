"""From rows of token ids to packed forward passes, under a token budget, balanced over ranks.

Nothing is padded: documents lie end to end in one row of T tokens with positions that start again at 0, and
models/attention.py keeps them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfctl.models.attention import Layout, PackedLayout


@dataclass(slots=True)
class Pack:
    """One forward pass. T tokens, N trained positions.

    ids, positions [1, T]; layout: the documents' borders; predictors [N]: index of the hidden state that predicts each
    trained token (its own index minus one); targets [N]: the trained tokens; rows: which input rows, in pack order;
    counts: trained positions of each of them; read [R]: the predictors' positions, each once, ascending.
    """

    ids: Tensor
    positions: Tensor
    layout: Layout
    predictors: Tensor
    targets: Tensor
    rows: list[int]
    counts: list[int]
    read: Tensor


def pack(
    rows: Sequence[int],
    ids: Sequence[Sequence[int]],
    trained: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    bucket: int = 1,
) -> Pack:
    """Lay `rows` end to end; ids[i] are row i's tokens, trained[i] the indices (>= 1) of its trained tokens.

    bucket: the pack is filled up to a multiple of so many tokens, so that few different shapes occur
    (models/linear.py: shape_bucket says when that pays).
    """
    return _lay(rows, ids, trained, 1, device, bucket)


def pack_reading(
    rows: Sequence[int],
    ids: Sequence[Sequence[int]],
    read: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    bucket: int = 1,
) -> Pack:
    """Lay `rows` end to end and read hidden states at the token indices read[i] of row i (reward models): those are
    the pack's predictors; targets are the tokens that stand there."""
    return _lay(rows, ids, read, 0, device, bucket)


def _lay(
    rows: Sequence[int],
    ids: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    shift: int,
    device: torch.device | str,
    bucket: int,
) -> Pack:
    flat: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    for row in rows:
        start = len(flat)
        tokens = ids[row]
        flat.extend(tokens)
        positions.extend(range(len(tokens)))
        predictors.extend(start + index - shift for index in places[row])
        targets.extend(tokens[index] for index in places[row])
    lengths = [len(ids[row]) for row in rows]
    filler = -len(flat) % bucket
    if filler:  # a document of its own that nothing reads
        flat.extend([0] * filler)
        positions.extend(range(filler))
        lengths.append(filler)
    return Pack(
        ids=torch.tensor([flat], device=device),
        positions=torch.tensor([positions], device=device),
        layout=PackedLayout.of_lengths(lengths),
        predictors=torch.tensor(predictors, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        rows=list(rows),
        counts=[len(places[row]) for row in rows],
        read=torch.tensor(sorted(set(predictors)), dtype=torch.long, device=device),
    )


def plan_packs(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split rows into packs of at most `budget` tokens (a longer row gets its own), neighbours in length together.

    Sorting makes documents of one length adjacent, which is what lets them share attention calls.
    """
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    packs: list[list[int]] = []
    room = 0
    for row in ordered:
        if not packs or lengths[row] > room:
            packs.append([])
            room = budget
        packs[-1].append(row)
        room -= lengths[row]
    return packs


def split_over_ranks(rows: Sequence[int], lengths: Sequence[int], world: int) -> list[list[int]]:
    """Balance rows over ranks by tokens: longest first, each to the least loaded rank (ties: the lower rank)."""
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += lengths[row]
    return [sorted(share) for share in shares]
