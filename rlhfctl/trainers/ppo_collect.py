"""The batch of one step: rollouts and their scores; with dynamic sampling, round after round until it is full.

    round 1     batch_size / n prompts from the stream, n samples each
    round r     as many further prompts as the rounds before had groups without signal, at most max_refills times

Source: DAPO, arXiv 2503.14476, section 3.2 (dynamic sampling). A group without signal is one whose shaped scores are
all equal: a group estimator gives its samples the advantage 0.

1. How many prompts the run has taken is part of its checkpoint, and a sample's randomness is that of (seed, step, place
   among the step's samples): a resumed run asks the same prompts and gets the same responses.
2. When the rounds are used up the step is smaller. Its means are over the samples that it has.
3. A step in which no group at all has a signal keeps its first groups: the watch counts such steps and ends the run.
"""

from dataclasses import asdict

from rlhfctl.data.encode import PromptRow
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.rewards.build import Source
from rlhfctl.rewards.normalise import Running
from rlhfctl.rollout.engine import Engine
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers import ppo_rollout
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.logbook import Logbook
from rlhfctl.trainers.order import BatchOrder
from rlhfctl.trainers.ppo_rollout import Batch
from rlhfctl.trainers.trajectory import Trajectory


def collect(
    ctx: RunContext,
    recipe: PpoRecipe,
    engine: Engine,
    encoder: ChatEncoder,
    sources: list[Source],
    prompts: list[PromptRow],
    order: BatchOrder,
    step: int,
    taken: int,
    failures: int,
    running: Running,
    logbook: Logbook,
) -> Batch:
    """The batch of 0-based step `step`. taken: prompts that the run took before it; failures: rewards failed before
    it; running: what `normalisation: running` has seen, changed in place."""
    n = recipe.rollout.n
    wanted = recipe.train.batch_size // n
    asked: list[PromptRow] = []
    everyone: list[Trajectory] = []
    telling: list[list[Trajectory]] = []
    missing, rounds, before = wanted, 0, asdict(running)
    while True:
        first, rounds = len(asked), rounds + 1
        asked += [prompts[row] for row in order.rows_between(taken, taken + missing)]
        taken += missing
        with logbook.timed("rollout"):
            mine = ppo_rollout.sample(ctx, recipe, engine, encoder, asked, step, first)
        with logbook.timed("reward"):
            found, failures = ppo_rollout.score(
                ctx, recipe, sources, asked, mine, step + 1, failures, encoder
            )
            everyone += found
            # Shaped together with the rounds before: each sample is seen once.
            for name, value in before.items():
                setattr(running, name, value)
            batch = ppo_rollout.usable(recipe, sources, everyone, step + 1, failures, running)
        batch.prompts = taken
        if not recipe.rollout.dynamic_sampling:
            return batch
        telling = with_signal(batch.trajectories, n)
        missing = wanted - len(telling)
        if not missing or rounds > recipe.rollout.max_refills:
            break
    batch.metrics |= {
        "groups/sampled": float(len(asked)),
        "groups/dropped_fraction": 1.0 - len(telling) / len(asked),
        "groups/refills": float(rounds - 1),
    }
    batch.trajectories = renumbered(telling or grouped(batch.trajectories, n)[:wanted], n)
    return batch


def grouped(trajectories: list[Trajectory], n: int) -> list[list[Trajectory]]:
    """The samples of each prompt together, in order of index."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.index // n, []).append(trajectory)
    return list(groups.values())


def with_signal(trajectories: list[Trajectory], n: int) -> list[list[Trajectory]]:
    """The groups whose shaped scores differ."""
    return [
        group for group in grouped(trajectories, n) if len({trajectory.shaped for trajectory in group}) > 1
    ]


def renumbered(groups: list[list[Trajectory]], n: int) -> list[Trajectory]:
    """The samples with the places that they have in the batch, group by group."""
    found = []
    for place, group in enumerate(groups):
        for trajectory in group:
            trajectory.index = place * n + trajectory.index % n
            found.append(trajectory)
    return found
