"""The value model's part of a ppo step in one forward pass, where the batch is passed once.

Returns come from the values of the rollout, and a sample's returns from its own values alone (algorithms/gae.py): with
one epoch and one minibatch a pack's values are read, turned into returns and trained on before the next pack. A second
forward pass would give the same values again; no graph outlives its pack.
"""

import torch
from torch import Tensor

from rlhfctl.algorithms.gae import gae
from rlhfctl.algorithms.masking import per_token, token_weights
from rlhfctl.algorithms.value import value_loss
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import gather_lists
from rlhfctl.trainers.experience import sharing_of
from rlhfctl.trainers.ppo_models import PpoModels
from rlhfctl.trainers.trajectory import Trajectory


def passes_once(recipe: PpoRecipe, models: PpoModels) -> bool:
    """Whether the value model of its own sees the batch in a single pass. Not where all ranks pass together."""
    algorithm, critic = recipe.algorithm, models.critic
    apart = critic is not None and not critic.shares_hidden and not models.critic_passes.collective
    return apart and algorithm.ppo_epochs == 1 and algorithm.minibatches == 1


def fit_values(
    ctx: RunContext,
    recipe: PpoRecipe,
    models: PpoModels,
    trajectories: list[Trajectory],
    rewards: Tensor,
    mask: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Values [B, T] on every rank, and this rank's sums of the value loss; its gradients are added up.

    rewards, mask: [B, T]."""
    algorithm, critic = recipe.algorithm, models.critic
    assert critic is not None
    counts = torch.tensor([len(trajectory.trained) for trajectory in trajectories])
    weights = token_weights(
        counts, algorithm.loss_mean, int(counts.sum()), len(counts), recipe.rollout.max_new_tokens
    )
    sharing, budget = sharing_of(trajectories), recipe.train.tokens_per_microbatch
    sums = {"value_loss": 0.0, "value_clipped": 0.0}
    found: list[tuple[int, Tensor]] = []

    def forward() -> Tensor:
        return models.values(batch)

    for part in sharing.plan(range(len(counts)), budget, ctx.rank, ctx.world):
        batch = sharing.pack(part, ctx.device, models.bucket)
        members = batch.rows
        taken = mask[members]
        values = models.critic_passes.run(forward)
        now = values.detach().float().cpu()
        spread = torch.zeros(taken.shape).masked_scatter(taken, now)
        _, returns = gae(rewards[members], spread, taken, algorithm.gamma, algorithm.gae_lambda)
        fit, stats = value_loss(
            values,
            now.to(values.device),
            returns[taken].to(values.device),
            per_token(weights[members], counts[members]).to(values.device),
            algorithm.value_clip,
        )
        with critic.acting():
            models.critic_passes.backward(fit)
        sums["value_loss"] += float(fit.detach())
        sums["value_clipped"] += float(stats["clipped"])
        found += list(zip(members, now.split(batch.counts), strict=True))
    values_of = dict(gather_lists(found))
    every = torch.cat([values_of[row] for row in range(len(counts))])
    return torch.zeros(mask.shape).masked_scatter(mask, every), sums
