"""Rows that begin alike, laid so that what they share passes the model once: a prompt and its n samples, a pair's
conversation and its two answers.

    [ prefix | rest of row 1 | ... | rest of row n ]      positions of every rest go on where the prefix ends

Each rest attends to the prefix and to itself, causally: the hidden states are those of the rows one by one, and
gradients reach the prefix from all of them. It saves (n - 1) P of the n (P + L) tokens of a group. Short prefixes are
not worth a kernel call of their own. On other devices than a processor (models/pack_attention.py) attention to a prefix
goes through a mask, whose kernel does not leave out what lies above the diagonal.

P tokens of the prefix, L of the longest rest, n rows of a group; H, K, D as in models/attention.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhfctl.models import pack_attention
from rlhfctl.models.attention import PackedLayout, causal_attention, sdpa
from rlhfctl.models.pack_attention import Crossing, Run
from rlhfctl.models.packing import Pack, plan_packs, split_over_ranks

WORTH = 0.25  # a prefix of at least so much of the longest rest is shared


@dataclass(slots=True)
class Group:
    """start: of the prefix in the pack; rests: their lengths, end to end behind it."""

    start: int
    prefix: int
    rests: list[int]
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.start + self.prefix + sum(self.rests)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[n, L] index of each token among the rests (0 where a row has ended), and whether there is one."""
        lengths = torch.tensor(self.rests, device=device)
        steps = torch.arange(max(self.rests), device=device)
        real = steps[None] < lengths[:, None]
        return torch.where(real, (lengths.cumsum(0) - lengths)[:, None] + steps, 0), real

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """bool [L, P + L]."""
        if window not in self.masks:
            longest = max(self.rests)
            query = self.prefix + torch.arange(longest, device=device)
            distance = query[:, None] - torch.arange(self.prefix + longest, device=device)
            self.masks[window] = (distance >= 0) & (distance < (window or longest + self.prefix))
        return self.masks[window]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, H, T, D] of the whole pack -> [H, tokens of the group, D]."""
        count, longest, border = len(self.rests), max(self.rests), self.start + self.prefix
        equal = min(self.rests) == longest
        places, real = self.places(query.device)

        def prefix(x: Tensor) -> Tensor:
            return x[:, :, self.start : border]

        def rests(x: Tensor) -> Tensor:
            flat = x[0, :, border : self.end]
            rows = flat.unflatten(1, (count, longest)) if equal else flat[:, places]
            return rows.transpose(0, 1)  # [n, heads, L, D]

        def both(x: Tensor) -> Tensor:
            return torch.cat([prefix(x).expand(count, -1, -1, -1), rests(x)], 2)

        first = causal_attention(prefix(query), prefix(key), prefix(value), scale, window)[0]
        mask = self.mask(window, query.device)
        out = sdpa(rests(query), both(key), both(value), scale, mask=mask).transpose(0, 1)
        return torch.cat([first, out.flatten(1, 2) if equal else out[:, real]], 1)


@dataclass(slots=True)
class SharedLayout:
    """Groups first, then documents of their own."""

    groups: list[Group]
    alone: PackedLayout

    def pieces(self) -> tuple[list[Run], list[Crossing]]:
        """Every prefix and every rest as a document, and each group's crossing."""
        runs: list[Run] = []
        for group in self.groups:
            runs += PackedLayout.of_lengths([group.prefix, *group.rests], group.start).runs
        crossings = [Crossing(group.start, group.start + group.prefix, group.rests) for group in self.groups]
        return runs + self.alone.runs, crossings

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        if pack_attention.computes(query, value):
            runs, crossings = self.pieces()
            return pack_attention.attention(query, key, value, scale, window, runs, crossings)
        pieces = [group.attend(query, key, value, scale, window) for group in self.groups]
        if self.alone.runs:
            pieces.append(self.alone.attend(layer, query, key, value, scale, window)[0])
        return torch.cat(pieces, 1).unsqueeze(0)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with, short of the shortest one's last."""
    room = min(len(row) for row in rows) - 1
    first = rows[0]
    for place in range(room):
        if any(row[place] != first[place] for row in rows[1:]):
            return place
    return room


def worth_sharing(prefix: int, lengths: Sequence[int]) -> bool:
    return len(lengths) > 1 and 0 < prefix >= WORTH * (max(lengths) - prefix)


def pack_shared(
    groups: Sequence[tuple[int, Sequence[int]]],
    ids: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    shift: int,
    device: torch.device | str = "cpu",
    bucket: int = 1,
) -> Pack:
    """Lay groups of rows: (tokens of the shared prefix, rows), a prefix of 0 with one row for a document of its own.

    places[i]: token indices of row i; the pack's predictors are the hidden states at these minus `shift`: 1 reads what
    predicts the tokens, 0 what stands at them.
    """
    flat: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    laid: list[Group] = []
    lengths: list[int] = []
    ordered = sorted(groups, key=lambda group: group[0] == 0)
    for prefix, rows in ordered:
        start = len(flat)
        flat.extend(ids[rows[0]][:prefix])
        positions.extend(range(prefix))
        for row in rows:
            offset = len(flat) - prefix
            tokens = ids[row]
            flat.extend(tokens[prefix:])
            positions.extend(range(prefix, len(tokens)))
            for place in places[row]:
                index = place - shift
                predictors.append(start + index if index < prefix else offset + index)
                targets.append(tokens[place])
        if prefix:
            laid.append(Group(start, prefix, [len(ids[row]) - prefix for row in rows]))
        else:
            lengths.append(len(ids[rows[0]]))
    filler = -len(flat) % bucket
    if filler:  # a document of its own that nothing reads
        flat.extend([0] * filler)
        positions.extend(range(filler))
        lengths.append(filler)
    alone = PackedLayout.of_lengths(lengths, laid[-1].end if laid else 0)
    return Pack(
        ids=torch.tensor([flat], device=device),
        positions=torch.tensor([positions], device=device),
        layout=SharedLayout(laid, alone) if laid else alone,
        predictors=torch.tensor(predictors, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        rows=[row for _, rows in ordered for row in rows],
        counts=[len(places[row]) for _, rows in ordered for row in rows],
        read=torch.tensor(sorted(set(predictors)), dtype=torch.long, device=device),
    )


@dataclass(slots=True)
class Sharing:
    """Rows whose prompts may be shared. prompts: the prompt's tokens of each row, of `ids`."""

    ids: Sequence[Sequence[int]]
    places: Sequence[Sequence[int]]
    prompts: Sequence[int]

    def plan(self, rows: Sequence[int], budget: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """This rank's packs of at most `budget` tokens; samples of one prompt lie together, in parts small enough to
        balance the ranks."""
        most = len(rows) if world == 1 else max(1, len(rows) // (2 * world))
        units = self.units(sorted(rows), budget, most)
        costs = [self.tokens(unit) for unit in units]
        mine = split_over_ranks(range(len(units)), costs, world)[rank]
        return [[row for unit in part for row in units[unit]] for part in plan_packs(mine, costs, budget)]

    def pack(self, rows: Sequence[int], device: torch.device | str = "cpu", bucket: int = 1) -> Pack:
        """A pack of `plan` laid out, read where its trained tokens are predicted."""
        groups: list[tuple[int, list[int]]] = []
        for unit in self.units(rows, sum(len(self.ids[row]) for row in rows), len(rows)):
            shared = self.prompts[unit[0]] if len(unit) > 1 else 0
            groups.append((shared, unit))
        return pack_shared(groups, self.ids, self.places, 1, device, bucket)

    def units(self, rows: Sequence[int], budget: int, most: int) -> list[list[int]]:
        """Rows that pass together, at most so many and within the budget, in order of their first ones."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            by_prompt.setdefault(tuple(self.ids[row][: self.prompts[row]]), []).append(row)
        units: list[list[int]] = []
        for members in by_prompt.values():
            if not worth_sharing(self.prompts[members[0]], [len(self.ids[row]) for row in members]):
                units += [[row] for row in members]
                continue
            part: list[int] = []
            for row in members:
                if part and (len(part) == most or self.tokens([*part, row]) > budget):
                    units.append(part)
                    part = []
                part.append(row)
            units.append(part)
        return units

    def tokens(self, unit: Sequence[int]) -> int:
        """Tokens that pass the model for these rows of one prompt."""
        prefix = self.prompts[unit[0]]
        return prefix + sum(len(self.ids[row]) - prefix for row in unit)
