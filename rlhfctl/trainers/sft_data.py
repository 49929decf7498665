"""Rows of token ids for sft, and which of their tokens carry loss."""

from dataclasses import dataclass

from rlhfctl.data.prepared import sft_preparation
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import Data, DataSource
from rlhfctl.recipe.tasks import SftRecipe
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers.order import BatchOrder


@dataclass(slots=True)
class SftData:
    """ids[i]: tokens of row i; trained[i]: indices (>= 1) of its trained tokens; order: what step s trains on."""

    ids: list[list[int]]
    trained: list[list[int]]
    lengths: list[int]
    order: BatchOrder


def load_sft_rows(
    sources: list[DataSource], data: Data, encoder: ChatEncoder, seed: int, batch_size: int
) -> SftData:
    """Encode the rows of `sources`; rows longer than data.max_length are left out (preflight reports how many)."""
    made = sft_preparation(sources, data.max_bad_rows, encoder, data.max_length, data.train_on).make()
    if not made.rows:
        raise Refused(f"no row of {sources[0].path} fits data.max_length ({data.max_length} tokens)")
    return SftData(
        ids=[row.ids for row in made.rows],
        trained=[[index for index, on in enumerate(row.mask) if on and index > 0] for row in made.rows],
        lengths=[len(row.ids) for row in made.rows],
        order=BatchOrder(made.sources, made.places(), seed, batch_size, data.shuffle),
    )


def total_steps(recipe: SftRecipe, data: SftData) -> int:
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    return data.order.steps_for(recipe.train.epochs)
