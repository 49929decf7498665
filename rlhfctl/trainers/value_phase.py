"""The last phase of an oreo run with a `value_fit` section: sample the final policy, fit a value to what came of it,
choose the search's weight of log pi, and write value_model/. Checkpoints and metrics as in every phase."""

import time
from pathlib import Path

from torch import nn

from rlhfctl.errors import Refused
from rlhfctl.evaluation.answers import Judge
from rlhfctl.models.packing import split_over_ranks
from rlhfctl.models.value_model import ValueFunction, save_value_model
from rlhfctl.recipe.tasks import OreoRecipe
from rlhfctl.rewards.build import build_sources
from rlhfctl.run_dir import is_complete
from rlhfctl.trainers import checkpoint
from rlhfctl.trainers.collect import answerer_of, forget, prompts_of, sampled
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import barrier, sum_over_ranks
from rlhfctl.trainers.logbook import Logbook, refuse_non_finite
from rlhfctl.trainers.optimizer import clip_and_step
from rlhfctl.trainers.value_fit import (
    SAMPLE_STEP,
    Order,
    chosen,
    fresh_value,
    optimizer_of,
    prefixes,
    rows_of,
    train_batch,
)


def train(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, OreoRecipe)
    fit = recipe.value_fit
    assert fit is not None
    if is_complete(ctx.run.value_model):
        return
    own = {"path": str(ctx.run.final), "quantization": "none"}  # merged, and all of it is trained
    final = recipe.policy.model_copy(
        update={"from_config": None, "tokenizer": None, "chat_template": None, **own}
    )
    answerer = answerer_of(ctx, recipe, final)
    prompts, dropped = prompts_of(recipe, fit.prompts or recipe.data.train, answerer)
    if len(prompts) <= fit.held_out:
        raise Refused(
            f"value_fit.held_out {fit.held_out} leaves no prompt to sample of {len(prompts)}; {dropped.sentence()}"
        )
    held_out, asked = prompts[: fit.held_out], prompts[fit.held_out :]
    assert recipe.reward is not None
    sources = build_sources(recipe.reward, answerer.encoder, recipe.template)
    judge = Judge(sources, answerer.encoder, answerer.delimiters)
    pieces = ctx.run.path / "value_fit"
    repeated = [asked[index % len(asked)] for index in range(fit.samples)]
    answers = sampled(ctx, answerer, judge, repeated, SAMPLE_STEP, pieces, "value fit")
    rows = rows_of(asked, answers)
    lengths = [len(row.ids) for row in rows]
    ctx.say(f"value fit: {len(rows)} samples, {sum(row.right for row in rows)} right")

    model = fresh_value(answerer.policy, fit.head)
    total = ctx.first + fit.steps
    optimizer = optimizer_of(model, fit.lr or recipe.value_model.lr or recipe.optim.lr, fit.steps)
    order = Order(len(rows), fit.batch_size, recipe.seed)
    models: dict[str, nn.Module] = {"value": model}
    optimizers = {"value": optimizer}
    state = checkpoint.restore(ctx, models, optimizers) or {"step": ctx.first, "tokens": 0}
    start, seen = state["step"], state["tokens"]
    logbook = Logbook(ctx, total, start)
    metrics: dict[str, float] = {}
    for step in range(start, total):
        began = time.perf_counter()
        members = order.batch(step - ctx.first)
        mine = split_over_ranks(members, lengths, ctx.world)[ctx.rank]
        loss = train_batch(model, mine, rows, prefixes(members, rows), recipe.train.tokens_per_microbatch)
        loss = sum_over_ranks({"loss": loss})["loss"]
        refuse_non_finite(step + 1, "loss/value_fit", loss)
        lr = optimizer.current_lr()
        norm = clip_and_step([optimizer], recipe.optim.max_grad_norm)[0]
        refuse_non_finite(step + 1, "grad_norm/value", norm)
        seen += sum(lengths[member] for member in members)
        logbook.marks["train"] = time.perf_counter() - began
        metrics = {"loss/value_fit": loss, "grad_norm/value": norm, "lr": lr, "tokens": seen}
        state = {"step": step + 1, "tokens": seen}
        if step + 1 < total:
            logbook.log(step + 1, metrics)
            saved = checkpoint.due(recipe.train.save_every, step + 1, total)
            if saved:
                checkpoint.save(ctx, models, optimizers, state)
            checkpoint.stop_if_asked(ctx, saved, models, optimizers, state)
    checkpoint.refuse_non_finite_weights(ctx, models, total)
    facts: dict[str, object] = {"link": "logistic", "samples": len(rows), "steps": fit.steps}
    model.eval()
    found = chosen(ctx.say, answerer, judge, held_out, model)
    if found is not None:
        alpha, accuracies = found
        facts |= {"alpha": alpha, "held_out": {f"{each:g}": found for each, found in accuracies.items()}}
        metrics |= {"value_fit/alpha": alpha, "value_fit/accuracy": accuracies[alpha]}
        ctx.say(
            f"value fit: alpha {alpha:g}, accuracy {accuracies[alpha]:.3f} of beam 2 on {len(held_out)} "
            "held-out prompts"
        )
    logbook.log(total, metrics, force=True)
    logbook.close()
    for source in sources:
        source.close()
    answerer.engine.close()
    save(ctx, recipe, model, facts)
    forget(ctx, pieces)


def save(ctx: RunContext, recipe: OreoRecipe, model: ValueFunction, facts: dict[str, object]) -> None:
    if ctx.rank == 0:
        head = model.token_sum if model.kind == "token_sum" else model.scalar

        def write(directory: Path) -> None:
            save_value_model(directory, model.trunk, head, recipe.policy, facts)

        ctx.run.commit_value_model(ctx.run.value_model, write)
    barrier()
