"""Sample the policy and score what it wrote: the first half of a ppo step."""

import statistics
from dataclasses import dataclass
from typing import Any

from rlhfctl.data.encode import PromptRow, encode_prompts
from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused, RunFailed
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.rewards.build import Source
from rlhfctl.rewards.normalise import Running
from rlhfctl.rewards.sample import reward_sample
from rlhfctl.rewards.score import score_samples
from rlhfctl.rewards.shaping import shape
from rlhfctl.rollout.engine import Engine
from rlhfctl.rollout.types import Request, Sampling
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.tracking.metrics import append_jsonl
from rlhfctl.trainers import token_rewards
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import gather_lists
from rlhfctl.trainers.order import BatchOrder
from rlhfctl.trainers.trajectory import Trajectory, from_rollout


@dataclass(slots=True)
class Batch:
    """The step's usable trajectories over all ranks, in order of index, and what scoring them showed."""

    trajectories: list[Trajectory]
    metrics: dict[str, float]
    failures: int
    prompts: int = 0  # taken from the stream since the run began


def load_prompts(recipe: PpoRecipe, encoder: ChatEncoder) -> tuple[list[PromptRow], BatchOrder, int]:
    """The prompts, which of them step s takes, and the number of steps."""
    loaded = load_samples(recipe.data.train, recipe.data.max_bad_rows)
    limit = recipe.rollout.max_prompt_length or recipe.data.max_length - recipe.rollout.max_new_tokens
    prompts, dropped = encode_prompts(loaded.samples, encoder, limit)
    if not prompts:
        raise Refused(f"no prompt is left to train on: {dropped.sentence()}")
    place = {prompt.sample.id: index for index, prompt in enumerate(prompts)}
    rows = [place.get(sample.id) for sample in loaded.samples]
    per_step = recipe.train.batch_size // recipe.rollout.n
    order = BatchOrder(loaded.reports, rows, recipe.seed, per_step, recipe.data.shuffle)
    if recipe.train.steps is not None:
        return prompts, order, recipe.train.steps
    assert recipe.train.epochs is not None
    return prompts, order, order.steps_for(recipe.train.epochs)


def sample(
    ctx: RunContext,
    recipe: PpoRecipe,
    engine: Engine,
    encoder: ChatEncoder,
    prompts: list[PromptRow],
    step: int,
    first: int = 0,
) -> list[Trajectory]:
    """This rank's trajectories of the step: rollout.n for each of its prompts (every world-th one, from the prompt at
    `first` on: those before it have been sampled)."""
    n, rollout = recipe.rollout.n, recipe.rollout
    mine = range(first + ctx.rank, len(prompts), ctx.world)
    requests = [Request(place * n + k, prompts[place].ids) for place in mine for k in range(n)]
    sampling = Sampling(
        rollout.max_new_tokens,
        rollout.temperature,
        rollout.top_p,
        encoder.stop_ids,
        recipe.seed,
        step,
        rollout.max_batch_tokens,
    )
    rollouts = engine.generate(requests, sampling)
    return [from_rollout(rollout, prompts[rollout.index // n], encoder) for rollout in rollouts]


def score(
    ctx: RunContext,
    recipe: PpoRecipe,
    sources: list[Source],
    prompts: list[PromptRow],
    mine: list[Trajectory],
    step: int,
    failures: int,
    encoder: ChatEncoder,
) -> tuple[list[Trajectory], int]:
    """Score this rank's trajectories and bring all ranks' together, in order of index, with the failures so far;
    `failures` are those before.

    A failed reward is never a score: its sample has none and goes to quarantine.jsonl; past reward.max_failures the
    run stops with the cause. Raises RunFailed.
    """
    n = recipe.rollout.n
    rows = [reward_sample(prompts[trajectory.index // n].sample, trajectory.text) for trajectory in mine]
    scored = score_samples(sources, rows)
    for place, trajectory in enumerate(mine):
        trajectory.reward = scored.totals[place]
        scores: dict[str, float] = {}
        for name, outcomes in scored.outcomes.items():
            # Of sources that report one name the first one counts.
            trajectory.reward_metrics = outcomes[place].metrics | trajectory.reward_metrics
            found = outcomes[place].score
            if found is not None and len(sources) > 1:
                scores[name] = found
        trajectory.reward_metrics |= scores
        if token_rewards.wanted(recipe.reward) and trajectory.reward is not None:
            mine_of = {name: outcomes[place] for name, outcomes in scored.outcomes.items()}
            trajectory.token_rewards = token_rewards.token_scores(
                trajectory, sources, mine_of, recipe.reward, encoder
            )
            trajectory.unspread = token_rewards.unspread(sources, mine_of)
            trajectory.reward_metrics |= token_rewards.step_agreement(sources, mine_of)
    everyone: list[Trajectory] = sorted(gather_lists(mine), key=lambda trajectory: trajectory.index)
    quarantined: list[dict[str, Any]] = gather_lists(scored.failures)
    _quarantine(ctx, recipe, quarantined, step, failures)
    return everyone, failures + len(quarantined)


def usable(
    recipe: PpoRecipe,
    sources: list[Source],
    everyone: list[Trajectory],
    step: int,
    failures: int,
    running: Running,
) -> Batch:
    """Shape the scores of all samples of the step; those without a reward to train on are left out.

    running: what `normalisation: running` has seen, changed in place. Raises RunFailed where none is left.
    """
    n = recipe.rollout.n
    shaped = shape(
        [trajectory.reward for trajectory in everyone],
        [len(trajectory.response_ids) for trajectory in everyone],
        [trajectory.truncated for trajectory in everyone],
        recipe.reward.shaping,
        recipe.rollout.max_new_tokens,
        [trajectory.index // n for trajectory in everyone],
        running,
    )
    kept = []
    for trajectory, reward in zip(everyone, shaped.rewards, strict=True):
        if reward is not None:
            trajectory.shaped = reward
            kept.append(trajectory)
    if not kept:
        raise RunFailed(
            f"stopped at step {step}: none of the {len(everyone)} samples has a reward to train on "
            "(all failed, or reward.shaping.truncated drops them all)"
        )
    metrics = means(everyone) | shaped.metrics | _spread(everyone, [source.name for source in sources])
    metrics["reward/failures"] = float(failures)
    if recipe.reward.granularity != "sequence":
        metrics["reward/earned"] = statistics.fmean(
            each.earned for each in everyone if each.reward is not None
        )
    return Batch(kept, metrics, failures)


def means(trajectories: list[Trajectory]) -> dict[str, float]:
    """Means over the samples that have them: the raw score, each source's score, what the sources report."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.reward_metrics.items():
            values.setdefault(name, []).append(value)
    raw = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    values |= {"raw": raw} if raw else {}
    return {f"reward/{name}": sum(found) / len(found) for name, found in sorted(values.items())}


def _spread(trajectories: list[Trajectory], names: list[str]) -> dict[str, float]:
    """Deviation (population), least and most of each source's scores, where there are several sources."""
    found: dict[str, float] = {}
    for name in names:
        scores = [each.reward_metrics[name] for each in trajectories if name in each.reward_metrics]
        if scores and len(names) > 1:
            found[f"reward/{name}/std"] = statistics.pstdev(scores)
            found[f"reward/{name}/min"], found[f"reward/{name}/max"] = min(scores), max(scores)
    return found


def _quarantine(
    ctx: RunContext, recipe: PpoRecipe, failed: list[dict[str, Any]], step: int, before: int
) -> None:
    if ctx.rank == 0:
        for record in failed:
            append_jsonl(ctx.run.quarantine, {"step": step, **record})
    allowed = recipe.reward.max_failures
    if failed and before + len(failed) > allowed:
        first = failed[0]
        raise RunFailed(
            f"stopped at step {step}: {before + len(failed)} rewards failed, {allowed} allowed (reward.max_failures); "
            f"first: {first['source']}, sample {first['id']}: {first['status']}: {first['error']}; see quarantine.jsonl"
        )
