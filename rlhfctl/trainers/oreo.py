"""Offline reasoning optimisation: policy and value model from scored trajectories, no rollouts."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhfctl.algorithms import oreo
from rlhfctl.algorithms.value import explained_variance, explained_variance_sums
from rlhfctl.models.exact_kl import logprobs_and_kl
from rlhfctl.models.export import merged_copy
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors, load_causal_lm
from rlhfctl.models.lora import add_lora, own_parameters
from rlhfctl.models.packing import pack, plan_packs, split_over_ranks
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.models.value import Critic, load_critic
from rlhfctl.models.value_model import refuse_other_vocabulary, save_value_model
from rlhfctl.recipe.oreo_sections import OfflineReasoning
from rlhfctl.recipe.tasks import OreoRecipe
from rlhfctl.rollout.engine import HfEngine
from rlhfctl.trainers import checkpoint
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import barrier, sum_over_ranks
from rlhfctl.trainers.engine import build_optimizer, passes, whole, whole_on_rank_zero
from rlhfctl.trainers.evaluate import Evaluator
from rlhfctl.trainers.logbook import Logbook, refuse_non_finite
from rlhfctl.trainers.optimizer import PLAIN, Passes, clip_and_step
from rlhfctl.trainers.oreo_data import OreoData, Reference, load_trajectories

SUMS = (
    "policy_loss", "value_loss", "kl_loss", "kl", "tokens", "log_ratio", "residual", "units",
    "right", "right_count", "wrong", "wrong_count",
    "count", "returns", "returns_squares", "errors", "errors_squares",
)  # fmt: skip


def train(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, OreoRecipe)
    algorithm = recipe.algorithm
    encoder = policy_encoder(recipe.policy, ctx.say)
    data = load_trajectories(ctx, recipe, encoder)
    policy = load_causal_lm(recipe.policy, ctx.device, recipe.seed)
    if recipe.policy.lora is not None:
        add_lora(policy, recipe.policy.lora, recipe.seed)
    if recipe.value_model.init != "policy":
        refuse_other_vocabulary(recipe.value_model.init, recipe.policy.tokenizer or str(recipe.policy.path))
    critic = load_critic(recipe.value_model, recipe.policy, policy, ctx.device, recipe.seed, None)
    reference = Reference(ctx, recipe, policy)
    reference.fill(
        ctx,
        data,
        algorithm.reference_cache_mb,
        recipe.train.tokens_per_microbatch,
        algorithm.reference_cache_dir,
    )
    steps = recipe.train.steps or data.order.steps_for(recipe.train.epochs or 1)
    first, total = ctx.first, ctx.first + steps
    warmup = algorithm.value_warmup_steps
    optim = recipe.optim
    limit = optim.max_grad_norm
    learner = build_optimizer(
        recipe, [policy], own_parameters(policy), optim.lr, max(1, steps - warmup), limit
    )
    critic_lr = recipe.value_model.lr or optim.lr
    critic_learner = build_optimizer(recipe, [critic], critic.named_parameters(), critic_lr, steps, limit)
    optimizers = {"policy": learner, "critic": critic_learner}
    engine, evaluator = HfEngine(policy), Evaluator(ctx, encoder)

    models: dict[str, nn.Module] = {"policy": policy, "critic": critic}
    state = checkpoint.restore(ctx, models, optimizers) or {"step": first, "tokens": 0}
    start, seen = state["step"], state["tokens"]
    logbook = Logbook(ctx, total, start)
    if start == 0 and evaluator.wanted:
        with whole([learner]):
            logbook.log(0, evaluator.run(policy, engine), force=True)

    for step in range(start, total):
        began = time.perf_counter()
        rows = data.order.batch(step - first)
        mine = split_over_ranks(rows, data.lengths, ctx.world)[ctx.rank]
        trains = step - first >= warmup
        still = reference.unmoved and not trains  # policy and reference are the same weights
        sums = sum_over_ranks(
            train_batch(policy, critic, reference, data, mine, len(rows), algorithm, trains, still,
                        recipe.train.tokens_per_microbatch, learner, critic_learner)
        )  # fmt: skip
        metrics = step_metrics(sums, data, rows)
        for name in ("loss/policy", "loss/value"):
            refuse_non_finite(step + 1, name, metrics[name])
        lr = optimizers["policy"].current_lr() if trains else 0.0
        stepped = [*(["policy"] if trains else []), "critic"]
        norms = clip_and_step([optimizers[name] for name in stepped], limit)
        for name, norm in zip(stepped, norms, strict=True):
            shown = "grad_norm" if name == "policy" else "grad_norm/value"
            refuse_non_finite(step + 1, shown, norm)
            metrics[shown] = norm

        tokens = sum(data.lengths[row] for row in rows)
        seen += tokens
        elapsed = time.perf_counter() - began
        logbook.marks["train"] = elapsed
        metrics |= {"lr": lr, "tokens": seen, "samples": len(rows), "tokens_per_second": tokens / elapsed}
        if evaluator.due(step + 1, total):
            with logbook.timed("eval"), whole([learner]):
                metrics |= evaluator.run(policy, engine)
        logbook.log(step + 1, metrics, force=evaluator.due(step + 1, total))

        state = {"step": step + 1, "tokens": seen}
        checkpoint.step_boundary(ctx, models, optimizers, state, total)
    logbook.close()
    engine.close()
    with whole_on_rank_zero(optimizers.values()):
        save_critic(ctx, recipe, critic)
        checkpoint.save_final(ctx, policy, total)


def train_batch(
    policy: nn.Module,
    critic: Critic,
    reference: Reference,
    data: OreoData,
    rows: list[int],
    batch_size: int,
    algorithm: OfflineReasoning,
    trains: bool,
    still: bool,
    budget: int,
    learner: Passes = PLAIN,
    critic_learner: Passes = PLAIN,
) -> dict[str, float]:
    """Forward and backward of both models over this rank's rows; its part of each loss, and sums.

    trains: the policy gets a gradient. V of the policy loss is the one from before this step's critic step.
    """
    weight = head_weight(policy)
    device, trunk = weight.device, backbone(policy)
    sums = dict.fromkeys(SUMS, 0.0)

    def policy_pass() -> tuple[Tensor, Tensor]:
        """log pi - log pi_ref and the exact KL, [N] each."""
        ref_hidden = reference.hidden(batch)
        with torch.set_grad_enabled(trains):
            hidden = hidden_at_predictors(trunk, batch)
            logprobs, ref_logprobs, kl = logprobs_and_kl(
                hidden, head_weight(policy), batch.targets, ref_hidden, reference.weight
            )
        return logprobs - ref_logprobs, kl

    for members, counted in passes([learner, critic_learner], plan_packs(rows, data.lengths, budget)):
        batch = pack(members, data.ids, data.trained, device, shape_bucket(weight.dtype, device))
        width = max(batch.counts)
        mask = torch.arange(width, device=device)[None] < torch.tensor(batch.counts, device=device)[:, None]
        weights = torch.full((len(members),), counted / batch_size, device=device)
        rewards = torch.tensor([data.rows[row].reward for row in members], device=device)
        returns = rewards[:, None].expand_as(mask)  # the reward comes at the end: R_t is the same for every t
        steps = padded(
            torch.tensor([s for row in members for s in data.rows[row].steps], device=device), batch.counts
        )

        values = padded(critic_learner.run(lambda: critic(batch, trunk)), batch.counts)  # noqa: B023
        if still:
            log_ratios, kl = torch.zeros_like(values), torch.zeros_like(values)
        else:
            log_ratios, kl = (padded(found, batch.counts) for found in learner.run(policy_pass))
        targets = oreo.value_targets(log_ratios, returns, mask, algorithm.beta)
        starts = oreo.value_starts(algorithm.level, steps, mask)
        table = algorithm.step_weights
        factors = None if table is None else oreo.step_factors(torch.tensor(table, device=device), steps)
        value_loss = oreo.value_loss(values, targets, starts, weights, factors)
        with critic.acting():
            critic_learner.backward(value_loss)
        units = oreo.units_of(algorithm.level, steps)
        policy_loss, found = oreo.policy_loss(
            log_ratios, values, returns, units, mask, weights, algorithm.beta, factors
        )
        kl_loss = oreo.token_mean(kl, mask, weights)
        if trains:
            learner.backward(policy_loss + algorithm.alpha * kl_loss)
        if not counted:
            continue
        policy_loss, value_loss, kl_loss = policy_loss.detach(), value_loss.detach(), kl_loss.detach()
        with torch.no_grad():
            right = torch.tensor([data.rows[row].right for row in members], device=device)[:, None] & starts
            wrong = starts & ~right
            part = {
                "policy_loss": policy_loss, "value_loss": value_loss, "kl_loss": kl_loss,
                "kl": torch.where(mask, kl, 0.0).sum(), "tokens": mask.sum(),
                "log_ratio": torch.where(mask, log_ratios, 0.0).sum(),
                "residual": found["absolute"], "units": found["units"],
                "right": values[right].sum(), "right_count": right.sum(),
                "wrong": values[wrong].sum(), "wrong_count": wrong.sum(),
            } | explained_variance_sums(values.detach(), targets, starts)  # fmt: skip
        for name, value in part.items():
            sums[name] += float(value)
    return sums


def padded(flat: Tensor, counts: list[int]) -> Tensor:
    """[N] -> [B, T], zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(flat.split(counts), batch_first=True)


def step_metrics(sums: dict[str, float], data: OreoData, rows: list[int]) -> dict[str, float]:
    metrics = {
        "loss/policy": sums["policy_loss"],
        "loss/value": sums["value_loss"],
        "loss/kl": sums["kl_loss"],
        "kl/exact": sums["kl"] / sums["tokens"],
        "kl/data": sums["log_ratio"] / sums["tokens"],
        "oreo/residual": sums["residual"] / sums["units"],
        "value/mean": (sums["right"] + sums["wrong"]) / sums["count"],
        "value/explained_variance": explained_variance(sums),
        "reward/mean": sum(data.rows[row].reward for row in rows) / len(rows),
    }
    for side in ("right", "wrong"):
        if sums[f"{side}_count"]:
            metrics[f"value/{side}"] = sums[side] / sums[f"{side}_count"]
    return metrics


def save_critic(ctx: RunContext, recipe: OreoRecipe, critic: Critic) -> None:
    """RUN/value_model/: what search guided by V loads; critic/ where a value is fitted at the end. Of a round that is
    not the last: beside its policy."""
    target = ctx.run.value_model if recipe.value_fit is None else ctx.run.path / "critic"
    if ctx.phase is not None and ctx.phase.model is not None:
        target = ctx.phase.model.parent / "value_model"
    if ctx.rank == 0:
        trunk = critic.backbone
        assert trunk is not None  # the recipe refuses a shared trunk
        if recipe.value_model.lora is not None:
            with critic.acting():
                trunk = merged_copy(trunk)
        facts = {"level": recipe.algorithm.level, "beta": recipe.algorithm.beta}

        def write(directory: Path) -> None:
            save_value_model(directory, trunk, critic.head.weight, recipe.policy, facts)

        ctx.run.commit_value_model(target, write)
    barrier()
