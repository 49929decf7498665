"""The implicit process reward model of `algorithm.advantage: prime`: its rewards of a batch, and its own update."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhfctl.algorithms.implicit_prm import outcome_loss, process_rewards
from rlhfctl.models.head import token_logprobs
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors, load_causal_lm
from rlhfctl.models.packing import Pack, pack, plan_packs, split_over_ranks
from rlhfctl.recipe.sections import ImplicitPrm
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import sum_over_ranks
from rlhfctl.trainers.engine import passes
from rlhfctl.trainers.experience import pad, score_tokens
from rlhfctl.trainers.logbook import refuse_non_finite
from rlhfctl.trainers.optimizer import PLAIN, Learner, Passes, clip_and_step
from rlhfctl.trainers.trajectory import Trajectory


@dataclass(slots=True)
class Prm:
    """model: pi_phi, trained; start: the same weights frozen; passes: how passes that train are made."""

    spec: ImplicitPrm
    model: nn.Module
    start: nn.Module
    passes: Passes = PLAIN

    def rewards(
        self, ctx: RunContext, recipe: PpoRecipe, trajectories: list[Trajectory]
    ) -> tuple[Tensor, Tensor]:
        """(r_t [B, T], log pi_ref [B, T]) on every rank."""
        mine, start = (
            score_tokens(
                trajectories,
                forward(model),
                ctx.rank,
                ctx.world,
                recipe.train.tokens_per_microbatch,
                ctx.device,
            )
            for model in (self.model, self.start)
        )
        mask = pad([trajectory.mask for trajectory in trajectories])
        return process_rewards(mine, start, mask, self.spec.beta), start


def forward(model: nn.Module):  # type: ignore[no-untyped-def]
    """Log-probabilities [N] of a pack at temperature 1."""

    def logprobs(batch: Pack) -> Tensor:
        hidden = hidden_at_predictors(backbone(model), batch)
        return token_logprobs(hidden, head_weight(model), batch.targets, with_entropy=False)[0]

    return logprobs


def load_prm(ctx: RunContext, recipe: PpoRecipe) -> Prm | None:
    """From implicit_prm.path, or from where the policy starts; None with another advantage."""
    if recipe.algorithm.advantage != "prime":
        return None
    spec = recipe.implicit_prm or ImplicitPrm()
    # Trained in full: its weights cannot be quantised.
    policy = recipe.policy.model_copy(update={"lora": None, "quantization": "none"})
    if spec.path is not None:
        policy = policy.model_copy(update={"path": spec.path, "from_config": None})
    start = load_causal_lm(policy, ctx.device, recipe.seed).requires_grad_(False).eval()
    return Prm(spec, load_causal_lm(policy, ctx.device, recipe.seed), start)


def learn(
    ctx: RunContext,
    recipe: PpoRecipe,
    prm: Prm,
    optimizer: Learner,
    trajectories: list[Trajectory],
    ref_logprobs: Tensor,
    step: int,
) -> dict[str, float]:
    """One optimizer step on the outcomes of the batch, after it was scored."""
    ids = [trajectory.ids for trajectory in trajectories]
    trained = [trajectory.trained for trajectory in trajectories]
    lengths, count = [len(row) for row in ids], len(ids)
    outcomes = torch.tensor([float((t.reward or 0.0) > prm.spec.outcome_threshold) for t in trajectories])
    sums = {"loss": 0.0, "right": 0.0}
    mine = split_over_ranks(range(count), lengths, ctx.world)[ctx.rank]
    packs = plan_packs(mine, lengths, recipe.train.tokens_per_microbatch)
    for members, counted in passes([prm.passes], packs):
        batch = pack(members, ids, trained, ctx.device)
        found = prm.passes.run(lambda: forward(prm.model)(batch)).split(batch.counts)  # noqa: B023
        totals = torch.stack([part.sum() for part in found])
        reference, outcome = ref_logprobs[batch.rows].sum(1), outcomes[batch.rows]
        loss, stats = outcome_loss(
            totals, reference.to(totals.device), outcome.to(totals.device), prm.spec.beta, count
        )
        prm.passes.backward(loss * float(counted))
        sums["loss"] += float(loss.detach()) * counted
        sums["right"] += float(stats["right"]) * counted
    sums = sum_over_ranks(sums)
    norm = clip_and_step([optimizer], prm.spec.max_grad_norm)[0]
    refuse_non_finite(step + 1, "loss/implicit_prm", sums["loss"])
    refuse_non_finite(step + 1, "grad_norm/implicit_prm", norm)
    return {
        "loss/implicit_prm": sums["loss"],
        "reward/implicit_accuracy": sums["right"] / count,
        "reward/outcome_mean": float(outcomes.mean()),
        "grad_norm/implicit_prm": norm,
    }
