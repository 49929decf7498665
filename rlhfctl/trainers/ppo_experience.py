"""Which forward passes a ppo step needs before its update, and which it can do without."""

from torch import Tensor

from rlhfctl.models.load import head_weight
from rlhfctl.recipe.sections import ImplicitPrm
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.experience import Experience, build, pad, score_tokens
from rlhfctl.trainers.ppo_models import Forward, PpoModels
from rlhfctl.trainers.trajectory import Trajectory


def make_experience(
    ctx: RunContext,
    recipe: PpoRecipe,
    models: PpoModels,
    trajectories: list[Trajectory],
    process: Tensor | None = None,
) -> Experience:
    """Old log-probabilities come from the sampler where it computed in float32 with the trainer's own weights;
    otherwise from a forward pass, unless the first pass of the update is that forward pass (one minibatch)."""
    algorithm = recipe.algorithm

    def per_token(forward: Forward):  # type: ignore[no-untyped-def]
        budget = recipe.train.tokens_per_microbatch
        return score_tokens(trajectories, forward, ctx.rank, ctx.world, budget, ctx.device, models.bucket)

    ref_logprobs = per_token(models.reference) if models.reference is not None else None
    values = per_token(models.values) if models.critic is not None else None
    old_logprobs = pad([trajectory.logprobs for trajectory in trajectories])
    known = True
    if recompute_old(recipe, models):
        penalty_needs_it = ref_logprobs is not None and algorithm.kl_in == "reward"
        if algorithm.minibatches > 1 or penalty_needs_it:
            old_logprobs = per_token(models.logprobs)
        else:
            known = False
    experience = build(
        trajectories,
        old_logprobs,
        ref_logprobs,
        values,
        algorithm,
        recipe.rollout.n,
        recipe.reward.shaping,
        None if process is None else (process, (recipe.implicit_prm or ImplicitPrm()).coef),
    )
    experience.old_known = known
    return experience


def recompute_old(recipe: PpoRecipe, models: PpoModels) -> bool:
    if recipe.algorithm.old_logprobs == "auto":
        if recipe.algorithm.importance_correction == "tis":
            return True  # it compares the two
        if recipe.rollout.engine != "hf":
            return True  # other kernels than the trainer's
        return head_weight(models.policy).dtype.itemsize < 4
    return recipe.algorithm.old_logprobs == "recompute"
