"""Sample the policy and score what it wrote: the first half of a ppo step."""

from typing import Any

from torch import nn

from rlhfctl.data.encode import PromptRow
from rlhfctl.errors import RunFailed
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.rewards.score import score_samples
from rlhfctl.rewards.shaping import shape
from rlhfctl.rollout.hf import Sampling, generate
from rlhfctl.rollout.types import Request
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.tracking.metrics import append_jsonl
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import gather_lists
from rlhfctl.trainers.evaluate import reward_sample
from rlhfctl.trainers.trajectory import Trajectory, from_rollout


def sample(
    ctx: RunContext, recipe: PpoRecipe, policy: nn.Module, encoder: ChatEncoder, prompts: list[PromptRow], step: int
) -> list[Trajectory]:
    """This rank's trajectories of the step: rollout.n for each of its prompts (every world-th one)."""
    n, rollout = recipe.rollout.n, recipe.rollout
    requests = [
        Request(place * n + k, prompts[place].ids) for place in range(ctx.rank, len(prompts), ctx.world) for k in range(n)
    ]
    sampling = Sampling(
        rollout.max_new_tokens,
        rollout.temperature,
        rollout.top_p,
        encoder.stop_ids,
        recipe.seed,
        step,
        rollout.max_batch_tokens,
    )
    rollouts = generate(policy, requests, sampling)
    return [from_rollout(rollout, prompts[rollout.index // n], encoder) for rollout in rollouts]


@dataclass(slots=True)
class Batch:
    """The step's usable trajectories over all ranks, in order of index, and what scoring them showed."""

    trajectories: list[Trajectory]
    metrics: dict[str, float]
