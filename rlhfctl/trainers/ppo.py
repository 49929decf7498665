"""PPO with token-level rewards: rollout, score, advantages, epochs of minibatches, log, save."""

import time
from dataclasses import asdict
from typing import Any

from rlhfctl.errors import RunFailed
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.rewards.build import build_sources
from rlhfctl.rewards.normalise import Running
from rlhfctl.rollout.engine import build_engine
from rlhfctl.rollout.types import EngineLost
from rlhfctl.trainers import checkpoint
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.engine import build_optimizer, whole, whole_on_rank_zero
from rlhfctl.trainers.evaluate import Evaluator
from rlhfctl.trainers.implicit_prm import learn, load_prm
from rlhfctl.trainers.logbook import Logbook
from rlhfctl.trainers.ppo_collect import collect
from rlhfctl.trainers.ppo_experience import make_experience, next_kl_coef
from rlhfctl.trainers.ppo_metrics import batch_metrics
from rlhfctl.trainers.ppo_models import build_optimizers, load_models
from rlhfctl.trainers.ppo_rollout import load_prompts
from rlhfctl.trainers.ppo_update import update
from rlhfctl.trainers.watch import Watch


def train(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, PpoRecipe)
    encoder = policy_encoder(recipe.policy, ctx.say)
    prompts, order, total = load_prompts(recipe, encoder)
    sources = build_sources(recipe.reward, encoder, recipe.template)
    models, prm = load_models(ctx, recipe), load_prm(ctx, recipe)
    updates = recipe.algorithm.ppo_epochs * recipe.algorithm.minibatches
    optimizers = build_optimizers(recipe, models, total * updates)
    trained, learners = models.trained(), dict(optimizers)
    if prm is not None:
        trained["implicit_prm"] = prm.model
        learners["implicit_prm"] = prm.passes = build_optimizer(
            recipe, [prm.model], prm.model.named_parameters(), prm.spec.lr, total, prm.spec.max_grad_norm
        )
    total += ctx.first
    evaluator = Evaluator(ctx, encoder, sources)

    state: dict[str, Any] = {
        "step": ctx.first,
        "tokens": 0,
        "failures": 0,
        "prompts": 0,
        "kl_coef": recipe.algorithm.kl_coef,
    }
    state |= checkpoint.restore(ctx, trained, learners) or {}
    start = state["step"]
    longest = (recipe.rollout.max_prompt_length or recipe.data.max_length) + recipe.rollout.max_new_tokens
    engine = build_engine(
        recipe.rollout,
        models.policy,
        longest,
        recipe.policy.trust_remote_code,
        ctx.run.attempt(ctx.attempt),
        ctx.say,
    )
    engine.sync(models.policy, start, learners["policy"].run)
    # The trainer's own module samples: ranks make different numbers of passes. Another engine has its own weights.
    samplers = [learners["policy"]] if recipe.rollout.engine == "hf" else []
    logbook = Logbook(ctx, total, start)
    watch = Watch(ctx, recipe, sources, evaluator.size)
    watch.restore(state.get("watch"))
    running = Running(**state.get("running", {}))
    if start == 0 and evaluator.wanted:
        with whole(samplers):
            found = evaluator.run(models.policy, engine)
        logbook.log(0, found, force=True)
        watch.evaluated(0, found)

    for step in range(start, total):
        began = time.perf_counter()
        try:
            with whole(samplers):
                batch = collect(
                    ctx,
                    recipe,
                    engine,
                    encoder,
                    sources,
                    prompts,
                    order,
                    step,
                    state["prompts"],
                    state["failures"],
                    running,
                    logbook,
                )
        except EngineLost as lost:
            checkpoint.keep(ctx, trained, learners, state)
            raise RunFailed(f"{lost.message}; the state before it is kept, continue with --resume") from lost
        with logbook.timed("experience"):
            process = ref = None
            if prm is not None:
                with whole([learners["implicit_prm"]]):
                    process, ref = prm.rewards(ctx, recipe, batch.trajectories)
            experience = make_experience(ctx, recipe, models, batch.trajectories, process, state["kl_coef"])
        with logbook.timed("train"):
            lr = optimizers["policy"].current_lr()
            metrics = update(ctx, recipe, models, optimizers, experience, step)
            if prm is not None and ref is not None:
                metrics |= learn(ctx, recipe, prm, learners["implicit_prm"], batch.trajectories, ref, step)
        with logbook.timed("sync"):
            metrics |= engine.sync(models.policy, step + 1, learners["policy"].run)

        tokens = sum(experience.response_lengths)
        metrics |= batch.metrics | batch_metrics(experience)
        state = {
            "step": step + 1,
            "tokens": state["tokens"] + tokens,
            "failures": batch.failures,
            "prompts": batch.prompts,
            "kl_coef": next_kl_coef(ctx, recipe, experience, metrics, step),
        }
        metrics |= {"lr": lr, "tokens": state["tokens"]}
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
        if evaluator.due(step + 1, total):
            with logbook.timed("eval"), whole(samplers):
                metrics |= evaluator.run(models.policy, engine)
        logbook.log(step + 1, metrics, force=evaluator.due(step + 1, total))
        logbook.samples(step + 1, experience, encoder)
        watch.check(step + 1, metrics, experience)
        state |= {"watch": watch.state(), "running": asdict(running)}

        checkpoint.step_boundary(ctx, trained, learners, state, total)
    logbook.close()
    with whole_on_rank_zero(learners.values()):
        checkpoint.save_final(ctx, models.policy, total)
    for source in sources:
        source.close()
    engine.close()
