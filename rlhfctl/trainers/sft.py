"""Supervised fine-tuning: cross-entropy on the assistant's tokens; the global batch is the unit of the mean."""

import time

import torch
from torch import Tensor, nn

from rlhfctl.models.head import weighted_nll
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors, load_causal_lm
from rlhfctl.models.lora import add_lora
from rlhfctl.models.packing import pack, plan_packs, split_over_ranks
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.recipe.tasks import SftRecipe
from rlhfctl.rollout.engine import HfEngine
from rlhfctl.trainers import checkpoint
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import sum_over_ranks
from rlhfctl.trainers.engine import build_optimizer, passes, whole, whole_on_rank_zero
from rlhfctl.trainers.evaluate import Evaluator
from rlhfctl.trainers.logbook import Logbook, refuse_non_finite
from rlhfctl.trainers.optimizer import PLAIN, Passes, clip_and_step
from rlhfctl.trainers.sft_data import SftData, load_sft_rows, total_steps


def train(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, SftRecipe)
    encoder = policy_encoder(recipe.policy, ctx.say)
    data = load_sft_rows(recipe.data.train, recipe.data, encoder, recipe.seed, recipe.train.batch_size)
    policy = load_causal_lm(recipe.policy, ctx.device, recipe.seed)
    if recipe.policy.lora is not None:
        add_lora(policy, recipe.policy.lora, recipe.seed)
    steps = total_steps(recipe, data)
    total = ctx.first + steps
    limit = recipe.optim.max_grad_norm
    optimizer = build_optimizer(recipe, [policy], policy.named_parameters(), recipe.optim.lr, steps, limit)
    evaluator = Evaluator(ctx, encoder)

    models, optimizers = {"policy": policy}, {"policy": optimizer}
    state = checkpoint.restore(ctx, models, optimizers) or {"step": ctx.first, "tokens": 0}
    start, seen = state["step"], state["tokens"]
    engine = HfEngine(policy)
    logbook = Logbook(ctx, total, start)
    if start == 0 and evaluator.wanted:
        with whole([optimizer]):
            logbook.log(0, evaluator.run(policy, engine), force=True)

    for step in range(start, total):
        began = time.perf_counter()
        rows = data.order.batch(step - ctx.first)
        trained = sum(len(data.trained[row]) for row in rows)
        tokens = sum(data.lengths[row] for row in rows)
        mine = split_over_ranks(rows, data.lengths, ctx.world)[ctx.rank]
        loss = train_batch(policy, data, mine, trained, recipe.train.tokens_per_microbatch, optimizer)
        loss = sum_over_ranks({"loss": loss})["loss"]
        refuse_non_finite(step + 1, "loss/sft", loss)
        lr = optimizer.current_lr()
        norm = clip_and_step([optimizer], limit)[0]
        refuse_non_finite(step + 1, "grad_norm", norm)

        seen += tokens
        metrics = {"loss/sft": loss, "grad_norm": norm, "lr": lr, "tokens": seen, "tokens_trained": trained}
        elapsed = time.perf_counter() - began
        logbook.marks["train"] = elapsed
        metrics["tokens_per_second"] = tokens / elapsed
        if evaluator.due(step + 1, total):
            with logbook.timed("eval"), whole([optimizer]):
                metrics |= evaluator.run(policy, engine)
        logbook.log(step + 1, metrics, force=evaluator.due(step + 1, total))

        state = {"step": step + 1, "tokens": seen}
        checkpoint.step_boundary(ctx, models, optimizers, state, total)
    logbook.close()
    with whole_on_rank_zero([optimizer]):
        checkpoint.save_final(ctx, policy, total)


def train_batch(
    policy: nn.Module, data: SftData, rows: list[int], trained: int, budget: int, learner: Passes = PLAIN
) -> float:
    """Forward and backward over this rank's rows; returns its part of the mean over all `trained` tokens."""
    weight = head_weight(policy)
    device, bucket = weight.device, shape_bucket(weight.dtype, weight.device)

    def forward() -> Tensor:
        hidden = hidden_at_predictors(backbone(policy), batch)
        return weighted_nll(hidden, head_weight(policy), batch.targets, weights)

    total = 0.0
    for members, counts in passes([learner], plan_packs(rows, data.lengths, budget)):
        batch = pack(members, data.ids, data.trained, device, bucket)
        weights = torch.full((len(batch.targets),), counts / trained, device=device)
        loss = learner.run(forward)
        learner.backward(loss)
        total += float(loss.detach())
    return total
