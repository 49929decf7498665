"""ReFT: supervised warm-up, then ppo on the same questions from its end; two phases of one run. Or, for comparison,
the paper's baselines as the second phase (trainers/self_training.py).

Steps number through. The warm-up's model stays in the run directory: it is where the second phase starts and what its
KL penalty is measured against, in every attempt.
"""

import json
from dataclasses import replace
from typing import Any

from rlhfctl.recipe.tasks import PpoRecipe, ReftRecipe, SftRecipe
from rlhfctl.run_dir import is_complete
from rlhfctl.trainers import ppo, self_training, sft
from rlhfctl.trainers.context import Phase, RunContext


def train(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, ReftRecipe)
    first, start = 0, recipe.policy
    if recipe.warmup is not None:
        warm = ctx.run.warmup
        if not is_complete(warm):
            sft.train(replace(ctx, recipe=warmup_recipe(recipe), phase=Phase(1, 0, warm)))
        first = int(json.loads((warm / "phase.json").read_text())["step"])
        start = recipe.policy.model_copy(update={"path": str(warm), "from_config": None})
    if recipe.method == "offline_st":
        self_training.offline(ctx, recipe, start, first)
        return
    if recipe.method == "online_st":
        own = recipe.model_copy(update={"policy": start})
        self_training.online(replace(ctx, recipe=own, phase=Phase(2, first, None)))
        return
    second = rl_recipe(recipe).model_copy(update={"policy": start})
    ppo.train(replace(ctx, recipe=second, phase=Phase(2, first, None)))


def shared(recipe: ReftRecipe, task: type[SftRecipe] | type[PpoRecipe]) -> dict[str, Any]:
    """The sections that both have; checked when the run's recipe was."""
    return {name: getattr(recipe, name) for name in task.model_fields if hasattr(recipe, name)}


def warmup_recipe(recipe: ReftRecipe) -> SftRecipe:
    """The first phase as a recipe of sft."""
    warmup = recipe.warmup
    assert warmup is not None
    optim = recipe.optim.model_copy(
        update={"lr": warmup.lr, "schedule": warmup.schedule, "warmup_ratio": warmup.warmup_ratio}
    )
    train = recipe.train.model_copy(
        update={"steps": warmup.steps, "epochs": warmup.epochs, "batch_size": warmup.batch_size}
    )
    reward = recipe.reward if recipe.data.eval else None
    changed = {"task": "sft", "optim": optim, "train": train, "reward": reward}
    return SftRecipe.model_construct(**{**shared(recipe, SftRecipe), **changed})


def rl_recipe(recipe: ReftRecipe) -> PpoRecipe:
    """The second phase as a recipe of ppo."""
    return PpoRecipe.model_construct(**{**shared(recipe, PpoRecipe), "task": "ppo"})
