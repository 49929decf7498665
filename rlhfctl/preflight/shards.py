"""Over how many ranks DeepSpeed divides what belongs to a trained model."""

from dataclasses import dataclass

from rlhfctl.recipe.tasks import AnyRecipe


@dataclass(frozen=True, slots=True)
class Shards:
    """Over how many ranks each part of a trained model is divided (ZeRO); 1: every rank holds all of it."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1


WHOLE = Shards()


def shards_of(recipe: AnyRecipe, world: int) -> Shards:
    """ZeRO: stage 1 divides the optimizer, 2 the gradients too, 3 the weights as well."""
    stage = recipe.deepspeed.zero_stage if recipe.deepspeed is not None else 0
    return Shards(
        weights=world if stage == 3 else 1,
        gradients=world if stage >= 2 else 1,
        optimizer=world if stage >= 1 else 1,
    )
