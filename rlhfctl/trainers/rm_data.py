"""Rows of a reward model's run, and how a pack of them is read: which hidden states make up which score."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhfctl.algorithms.reward_model import segment_sums
from rlhfctl.data.encode_judged import JudgedRow, Reading
from rlhfctl.data.prepared import rm_preparation
from rlhfctl.errors import Refused
from rlhfctl.models.encoder_training import is_encoder, scores_of
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.reward_model import last_read
from rlhfctl.models.reward_training import scores_at
from rlhfctl.models.shared_prefix import common_prefix, pack_shared, worth_sharing
from rlhfctl.recipe.sections import DataSource, RewardModelling
from rlhfctl.recipe.tasks import RmRecipe
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers.order import BatchOrder


@dataclass(slots=True)
class RmData:
    """rows[i]; lengths[i]: tokens of its one or two conversations; order: what step s trains on."""

    rows: list[JudgedRow]
    lengths: list[int]
    order: BatchOrder


@dataclass(slots=True)
class PackScores:
    """Scores [rows] of the chosen sides, of the rejected sides (0 where there is none), and [steps] of all steps of the
    pack in row order; each 0 where the objective does not read it."""

    chosen: Tensor
    rejected: Tensor
    steps: Tensor


def load_rows(recipe: RmRecipe, sources: list[DataSource], encoder: ChatEncoder) -> RmData:
    """Encode the rows of `sources`; rows longer than data.max_length are left out (preflight reports how many)."""
    made = rm_preparation(recipe, sources, encoder).make()
    if not made.rows:
        raise Refused(f"no row of {sources[0].path} can be used: {made.report.sentence()}")
    order = BatchOrder(made.sources, made.places(), recipe.seed, recipe.train.batch_size, recipe.data.shuffle)
    lengths = [len(row.chosen.ids) + (len(row.rejected.ids) if row.rejected else 0) for row in made.rows]
    return RmData(made.rows, lengths, order)


def total_steps(recipe: RmRecipe, data: RmData) -> int:
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    return data.order.steps_for(recipe.train.epochs)


def padding_id(encoder: ChatEncoder, fallback: object) -> int | None:
    """The token that is not read at the end of a conversation: the tokenizer's padding token, else the model's, else
    one that no conversation ends with; None where there is none."""
    if encoder.pad_id is not None:
        return encoder.pad_id
    ids = [
        encoder.tokenizer.token_to_id(encoder.tokens.get(name) or "") for name in ("unk_token", "bos_token")
    ]
    candidates = [fallback if isinstance(fallback, int) else None, *ids]
    return next((i for i in candidates if i is not None and i not in encoder.stop_ids), None)


def score_pack(
    model: nn.Module,
    rows: Sequence[JudgedRow],
    algorithm: RewardModelling,
    pad: int | None,
    device: torch.device,
) -> PackScores:
    """One forward pass over both sides of all rows: every score is a sum of the head over some positions.

    What both sides of a pair begin with passes once, where it is long enough. The longest first, so that conversations
    of one length lie together and share attention calls. An encoder gives one score a conversation."""
    if is_encoder(model):
        return score_encoded(model, rows, pad)
    readings: list[Reading] = []
    owners: list[int] = []  # score of reading i: row r chosen -> r, rejected -> len(rows) + r
    for index, row in enumerate(rows):
        readings.append(row.chosen)
        owners.append(index)
        if row.rejected is not None:
            readings.append(row.rejected)
            owners.append(len(rows) + index)
    first_step, steps = [], 0
    for row in rows:
        first_step.append(steps)
        steps += len(row.chosen.steps)
    places: list[list[int]] = []
    answers: list[list[int]] = []  # for each place the score it belongs to, -1: none
    parts: list[list[int]] = []  # for each place the step it belongs to, -1: none
    whole = algorithm.objective != "step"
    for reading, owner in zip(readings, owners, strict=True):
        offset = first_step[owner] if owner < len(rows) else 0
        if algorithm.score == "token_sum":
            last = last_read(reading.ids, pad)
            tokens = [place for place in reading.response if place <= last]
            places.append(tokens)
            answers.append([owner if whole else -1] * len(tokens))
            parts.append([_step_of(place, reading.steps, offset) for place in tokens])
        else:
            end = [last_read(reading.ids, pad)] if whole else []
            places.append([*reading.steps, *end])
            answers.append([-1] * len(reading.steps) + [owner] * len(end))
            parts.append([offset + step for step in range(len(reading.steps))] + [-1] * len(end))
    ids = [reading.ids for reading in readings]
    groups = sides_together(ids, owners, len(rows))
    bucket = shape_bucket(next(model.parameters()).dtype, device)
    pack = pack_shared(groups, ids, places, 0, device, bucket)
    order = pack.rows
    values = scores_at(model, pack)
    both = segment_sums(values, flat(answers, order, device), 2 * len(rows))
    return PackScores(
        both[: len(rows)], both[len(rows) :], segment_sums(values, flat(parts, order, device), steps)
    )


def sides_together(ids: list[list[int]], owners: list[int], rows: int) -> list[tuple[int, list[int]]]:
    """(tokens of the shared beginning, readings): a pair's sides in one group where that is worth it, else apart."""
    groups: list[tuple[int, list[int]]] = []
    for index, owner in enumerate(owners):
        if owner < rows:
            groups.append((0, [index]))
            continue
        sides = [index - 1, index]
        shared = common_prefix([ids[side] for side in sides])
        if worth_sharing(shared, [len(ids[side]) for side in sides]):
            groups[-1] = (shared, sides)
        else:
            groups.append((0, [index]))
    return sorted(groups, key=lambda group: -max(len(ids[side]) for side in group[1]))


def score_encoded(model: nn.Module, rows: Sequence[JudgedRow], pad: int | None) -> PackScores:
    """As score_pack, of an encoder: both sides of all rows in one padded batch."""
    paired = [index for index, row in enumerate(rows) if row.rejected is not None]
    sides = [row.chosen.ids for row in rows] + [row.rejected.ids for row in rows if row.rejected is not None]
    found = scores_of(model, sides, pad or 0)
    rejected = found.new_zeros(len(rows)).index_copy(
        0, torch.tensor(paired, dtype=torch.long, device=found.device), found[len(rows) :]
    )
    return PackScores(found[: len(rows)], rejected, found.new_zeros(0))


def _step_of(place: int, ends: list[int], offset: int) -> int:
    """The step that a token belongs to; -1 behind the last one."""
    return next((offset + step for step, end in enumerate(ends) if place <= end), -1)


def flat(lists: list[list[int]], order: list[int], device: torch.device) -> Tensor:
    return torch.tensor([item for index in order for item in lists[index]], dtype=torch.long, device=device)
