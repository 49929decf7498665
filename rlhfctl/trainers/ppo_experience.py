"""Which forward passes a ppo step needs before its update, and which it can do without."""

from collections.abc import Callable

from torch import Tensor

from rlhfctl.algorithms.adaptive_kl import adapted_coef
from rlhfctl.models.load import head_weight
from rlhfctl.recipe.sections import ImplicitPrm
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.experience import Experience, build, pad, score_tokens
from rlhfctl.trainers.logbook import refuse_non_finite
from rlhfctl.trainers.optimizer import PLAIN, Passes
from rlhfctl.trainers.ppo_models import Forward, PpoModels
from rlhfctl.trainers.trajectory import Trajectory
from rlhfctl.trainers.value_once import fit_values, passes_once


def make_experience(
    ctx: RunContext,
    recipe: PpoRecipe,
    models: PpoModels,
    trajectories: list[Trajectory],
    process: Tensor | None = None,
    kl_coef: float | None = None,
) -> Experience:
    """Old log-probabilities come from the sampler where it computed in float32 with the trainer's own weights;
    otherwise from a forward pass, unless the first pass of the update is that forward pass (one minibatch; a KL penalty
    is then the sampler's, where it computed with these weights in bfloat16: 0.002 nats a token apart). With a
    shared trunk that forward pass gives the values too; a value model of its own that sees the batch once is trained
    here, as its values are read (trainers/value_once.py). kl_coef: of this step, default the recipe's."""
    algorithm = recipe.algorithm

    def per_token(forward: Forward, learner: Passes):  # type: ignore[no-untyped-def]
        budget = recipe.train.tokens_per_microbatch
        return score_tokens(
            trajectories, forward, ctx.rank, ctx.world, budget, ctx.device, models.bucket, learner
        )

    policy, critic = models.policy_passes, models.critic_passes
    ref_logprobs = None
    if models.reference is not None:
        ref_logprobs = per_token(models.reference, policy if models.reference_is_policy else PLAIN)
    old_logprobs = pad([trajectory.logprobs for trajectory in trajectories])
    values: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None
    value_sums: dict[str, float] | None = None

    def fitted(rewards: Tensor, mask: Tensor) -> Tensor:
        nonlocal value_sums
        found, value_sums = fit_values(ctx, recipe, models, trajectories, rewards, mask)
        return found

    recompute = recompute_old(recipe, models)
    penalty_needs_it = ref_logprobs is not None and algorithm.kl_in == "reward" and not rounds_alone(recipe)
    upfront = recompute and (algorithm.minibatches > 1 or penalty_needs_it)
    if upfront and models.critic is not None and models.critic.shares_hidden:
        old_logprobs, values = per_token(models.logprobs_and_values, policy).unbind(-1)
    else:
        if models.critic is not None:
            learner = policy if models.critic.shares_hidden else critic
            values = fitted if passes_once(recipe, models) else per_token(models.values, learner)
        if upfront:
            old_logprobs = per_token(models.logprobs, policy)
    experience = build(
        trajectories,
        old_logprobs,
        ref_logprobs,
        values,
        algorithm,
        recipe.rollout.n,
        recipe.reward.shaping,
        None if process is None else (process, (recipe.implicit_prm or ImplicitPrm()).coef),
        kl_coef,
    )
    experience.old_known = upfront or not recompute
    experience.value_sums = value_sums
    return experience


def recompute_old(recipe: PpoRecipe, models: PpoModels) -> bool:
    if recipe.algorithm.old_logprobs == "auto":
        if recipe.algorithm.importance_correction != "none":
            return True  # it compares the two
        if recipe.rollout.engine != "hf":
            return True  # other kernels than the trainer's
        return head_weight(models.policy).dtype.itemsize < 4
    return recipe.algorithm.old_logprobs == "recompute"


def rounds_alone(recipe: PpoRecipe) -> bool:
    """Whether the sampler's log-probabilities are the trainer's but for rounding, and nothing asks for the latter."""
    algorithm = recipe.algorithm
    asked = algorithm.old_logprobs != "auto" or algorithm.importance_correction != "none"
    return recipe.rollout.engine == "hf" and not asked


def next_kl_coef(
    ctx: RunContext, recipe: PpoRecipe, experience: Experience, metrics: dict[str, float], step: int
) -> float:
    """The coefficient of the step after 0-based step `step`: with algorithm.kl_target it follows this step's KL.

    While the value model warms up the policy is the reference: its KL says nothing. Raises RunFailed.
    """
    algorithm = recipe.algorithm
    if algorithm.kl_target is None or step - ctx.first < algorithm.value_warmup_steps:
        return experience.kl_coef
    refuse_non_finite(step + 1, "kl/reference", metrics["kl/reference"])
    return adapted_coef(
        experience.kl_coef,
        metrics["kl/reference"],
        algorithm.kl_target,
        algorithm.kl_horizon,
        len(experience.trajectories),
    )
