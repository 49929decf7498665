"""An oreo run: once on trajectories that are there, or in rounds of collect and train; then the value fit, if any.

Rounds are phases of one run, their steps number through. Round k leaves rounds/k/trajectories.jsonl and, unless it is
the last, policy/ and value_model/, which the next round starts from; the last one leaves final/ and value_model/
(critic/ where value_fit writes value_model/). What is complete is not made again, so a stop between or inside rounds
changes nothing.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhfctl.errors import Refused
from rlhfctl.evaluation import collect as rows
from rlhfctl.evaluation.answers import Judge
from rlhfctl.evaluation.run import Row
from rlhfctl.recipe.oreo_sections import Collect
from rlhfctl.recipe.sections import DataSource
from rlhfctl.recipe.tasks import OreoRecipe
from rlhfctl.rewards.build import build_sources
from rlhfctl.run_dir import is_complete
from rlhfctl.trainers import oreo, value_phase
from rlhfctl.trainers.collect import answerer_of, forget, prompts_of, sampled
from rlhfctl.trainers.context import Phase, RunContext
from rlhfctl.trainers.distributed import barrier

COLLECT_STEP = 3_000_000  # other random numbers than any step of training, evaluation or value_fit


def train(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, OreoRecipe)
    if recipe.collect is None and recipe.value_fit is None:
        oreo.train(ctx)
        return
    rounds = recipe.collect.rounds if recipe.collect is not None else 1
    began = first = 0
    before = None
    for number in range(1, rounds + 1):
        place, last = ctx.run.round(number), number == rounds
        goal = ctx.run.final if last else place / "policy"
        # The last round may be given more steps later, unless a value was fitted to its end.
        if not is_complete(goal) or (last and recipe.value_fit is None):
            part = round_recipe(recipe, before)
            if recipe.collect is not None:
                file = place / "trajectories.jsonl"
                if not file.is_file():
                    collect(ctx, part, recipe.collect, number, file)
                separator = recipe.algorithm.step_delimiters[0]  # where there are several, rows hold no steps
                trajectories = DataSource(path=str(file), format="trajectory", step_separator=separator)
                data = recipe.data.model_copy(update={"train": [trajectories]})
                part = part.model_copy(update={"data": data})
            oreo.train(replace(ctx, recipe=part, phase=Phase(number, first, None if last else goal)))
        began, first = first, int(json.loads((goal / "phase.json").read_text())["step"])
        before = place
    if recipe.value_fit is not None:
        steps = recipe.train.steps
        if steps is not None and steps != first - began:  # earlier rounds may have been shorter
            raise Refused(
                f"{ctx.run.path} has fitted a value to the policy of step {first}: "
                f"for train.steps {steps} start a new run"
            )
        value_phase.train(replace(ctx, phase=Phase(rounds + 1, first, None)))


def round_recipe(recipe: OreoRecipe, before: Path | None) -> OreoRecipe:
    """The recipe of one round. before: the directory of the round before it, None: there is none."""
    if before is None:
        return recipe
    collect = recipe.collect
    assert collect is not None
    start: dict[str, Any] = {"path": str(before / "policy"), "from_config": None}
    changed: dict[str, Any] = {
        "policy": recipe.policy.model_copy(update=start),
        "value_model": recipe.value_model.model_copy(
            update={"init": str(before / "value_model"), "head": "auto"}
        ),
    }
    if collect.reference == "initial":
        changed["reference"] = recipe.reference or recipe.policy.path
    return recipe.model_copy(update=changed)


def collect(ctx: RunContext, recipe: OreoRecipe, wanted: Collect, number: int, file: Path) -> None:
    """Sample the round's policy on data.train, judge, balance, and write trajectories, whole or not at all."""
    answerer = answerer_of(ctx, recipe, recipe.policy)
    prompts, dropped = prompts_of(recipe, recipe.data.train, answerer)
    if not prompts:
        raise Refused(f"no prompt of data.train can be sampled: {dropped.sentence()}")
    assert recipe.reward is not None
    sources = build_sources(recipe.reward, answerer.encoder, recipe.template)
    try:
        judge = Judge(sources, answerer.encoder, answerer.delimiters)
        asked = [prompt for prompt in prompts for _ in range(wanted.samples)]
        pieces = file.parent / "collected"
        answers = sampled(ctx, answerer, judge, asked, COLLECT_STEP + number, pieces, f"round {number}")
    finally:
        for source in sources:
            source.close()
        answerer.engine.close()
    if ctx.rank == 0:
        own = [answers[start : start + wanted.samples] for start in range(0, len(answers), wanted.samples)]
        found = [Row(prompt, each[0], each) for prompt, each in zip(prompts, own, strict=True)]
        aside = file.with_name(".trajectories.jsonl.aside")
        counts = rows.write(aside, found, wanted.balance, answerer.delimiters.texts)
        aside.rename(file)
        ctx.say(f"round {number}: {rows.sentence(file, counts)}")
    barrier()
    forget(ctx, pieces)
