"""Self-training, the baselines of ReFT (arXiv 2401.08967, section 4.1): supervised, on right answers of one's own.

offline_st  the warm-up's model answers each question `samples` times at temperature 1; of the right answers the first
            `keep` distinct ones, with the data's own, train the model that the warm-up started from
online_st   at every step the policy answers the step's questions; with G the questions' own answers and R the distinct
            right samples,
                loss = g mean_G(-log pi) + (1 - g) mean_R(-log pi),  means over tokens, g = gold_share
            Nothing is learned from a wrong answer, there is no KL and no value; R empty leaves the first term.

Steps number on from the warm-up's, and a stop anywhere changes nothing.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhfctl.data.encode import encode_sft, tools_of
from rlhfctl.data.load import load_samples
from rlhfctl.data.samples import Sample
from rlhfctl.errors import Refused, RunFailed
from rlhfctl.evaluation.answers import Answer, Judge
from rlhfctl.evaluation.run import Answerer
from rlhfctl.evaluation.settings import Settings
from rlhfctl.evaluation.subject import Subject
from rlhfctl.models.head import weighted_nll
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors, load_causal_lm
from rlhfctl.models.lora import add_lora
from rlhfctl.models.packing import pack, plan_packs, split_over_ranks
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.recipe.reft_sections import SelfTraining
from rlhfctl.recipe.sections import DataSource, Policy
from rlhfctl.recipe.tasks import ReftRecipe, SftRecipe
from rlhfctl.rewards.build import build_sources
from rlhfctl.rollout.engine import build_engine
from rlhfctl.rollout.types import EngineLost
from rlhfctl.run_dir import write_text
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers import checkpoint, ppo_rollout, sft
from rlhfctl.trainers.collect import forget, prompts_of, sampled
from rlhfctl.trainers.context import Phase, RunContext
from rlhfctl.trainers.distributed import barrier, sum_over_ranks
from rlhfctl.trainers.evaluate import Evaluator
from rlhfctl.trainers.logbook import Logbook, refuse_non_finite
from rlhfctl.trainers.optimizer import Optimizer, clip_and_step
from rlhfctl.trainers.trajectory import Trajectory

COLLECT_STEP = (
    4_000_000  # other random numbers than any step of training, evaluation, oreo's rounds or value_fit
)

Row = tuple[list[int], list[int]]  # token ids, and the indices of the trained ones


def offline(ctx: RunContext, recipe: ReftRecipe, warm: Policy, first: int) -> None:
    """Sample the warm-up's model once, then sft from where the warm-up started."""
    file = ctx.run.path / "self_training.jsonl"
    if not file.is_file():
        collect(ctx, recipe, warm, file)
    sources = [*recipe.data.train, DataSource(path=str(file), format="messages")]
    shared = {name: getattr(recipe, name) for name in SftRecipe.model_fields if hasattr(recipe, name)}
    shared |= {
        "task": "sft",
        "data": recipe.data.model_copy(update={"train": sources}),
        "reward": recipe.reward if recipe.data.eval else None,
    }
    sft.train(replace(ctx, recipe=SftRecipe.model_construct(**shared), phase=Phase(2, first, None)))


def collect(ctx: RunContext, recipe: ReftRecipe, warm: Policy, file: Path) -> None:
    """Distinct right answers of the warm-up's model as conversations, whole or not at all."""
    wanted = recipe.self_training or SelfTraining()
    subject = Subject(
        warm.model_copy(update={"lora": None}), [], recipe.reward, recipe.rollout, recipe.data.max_bad_rows
    )
    answerer = Answerer(subject, Settings(str(warm.path), search="sample", seed=recipe.seed), ctx.say)
    prompts, dropped = prompts_of(recipe, recipe.data.train, answerer)
    if not prompts:
        raise Refused(f"no question of data.train can be sampled: {dropped.sentence()}")
    sources = build_sources(recipe.reward, answerer.encoder, recipe.template)
    pieces = ctx.run.path / "sampled"
    try:
        judge = Judge(sources, answerer.encoder, answerer.delimiters)
        asked = [prompt for prompt in prompts for _ in range(wanted.samples)]
        answers = sampled(ctx, answerer, judge, asked, COLLECT_STEP, pieces, "self-training")
    finally:
        for source in sources:
            source.close()
        answerer.engine.close()
    if ctx.rank == 0:
        lines = []
        for place, prompt in enumerate(prompts):
            own = answers[place * wanted.samples : (place + 1) * wanted.samples]
            lines += [
                json.dumps(each) for each in conversations(prompt.sample, distinct_right(own, wanted.keep))
            ]
        if not lines:
            raise Refused(
                f"none of {len(answers)} samples of the warm-up's model is right: there is nothing to train on; "
                "warm up longer"
            )
        write_text(file, "".join(f"{line}\n" for line in lines))
        ctx.say(f"{file}: {len(lines)} right answers to {len(prompts)} questions")
    barrier()
    forget(ctx, pieces)


def distinct_right(answers: Sequence[Answer], keep: int) -> list[str]:
    """The first `keep` different texts that are right and whole; an empty one is no answer to train on."""
    texts = [each.text for each in answers if each.correct and not each.truncated and each.text.strip()]
    return list(dict.fromkeys(texts))[:keep]


def conversations(sample: Sample, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `messages`: what was asked, as it was asked, and each of the answers."""
    tools = tools_of(sample)
    shown = {} if tools is None else {"tools": tools}
    return [
        {
            "id": f"{sample.id}/self/{number}",
            "messages": [*sample.prompt(), {"role": "assistant", "content": text}],
            **shown,
        }
        for number, text in enumerate(texts)
    ]


def online(ctx: RunContext) -> None:
    recipe = ctx.recipe
    assert isinstance(recipe, ReftRecipe)
    encoder = policy_encoder(recipe.policy, ctx.say)
    prompts, order, steps = ppo_rollout.load_prompts(recipe, encoder)
    gold = gold_rows(recipe, encoder)
    sources = build_sources(recipe.reward, encoder, recipe.template)
    policy = load_causal_lm(recipe.policy, ctx.device, recipe.seed)
    if recipe.policy.lora is not None:
        add_lora(policy, recipe.policy.lora, recipe.seed)
    optimizer = Optimizer(policy.named_parameters(), recipe.optim, recipe.optim.lr, steps)
    models: dict[str, nn.Module] = {"policy": policy}
    optimizers = {"policy": optimizer}
    evaluator = Evaluator(ctx, encoder, sources)
    total = ctx.first + steps
    state = {"step": ctx.first, "tokens": 0, "failures": 0}
    state |= checkpoint.restore(ctx, models, optimizers) or {}
    start = state["step"]
    longest = (recipe.rollout.max_prompt_length or recipe.data.max_length) + recipe.rollout.max_new_tokens
    engine = build_engine(
        recipe.rollout,
        policy,
        longest,
        recipe.policy.trust_remote_code,
        ctx.run.attempt(ctx.attempt),
        ctx.say,
    )
    engine.sync(policy, start)
    logbook = Logbook(ctx, total, start)
    share = (recipe.self_training or SelfTraining()).gold_share
    if start == 0 and evaluator.wanted:
        logbook.log(0, evaluator.run(policy, engine), force=True)

    for step in range(start, total):
        began = time.perf_counter()
        asked = [prompts[row] for row in order.batch(step - ctx.first)]
        try:
            with logbook.timed("rollout"):
                mine = ppo_rollout.sample(ctx, recipe, engine, encoder, asked, step)
        except EngineLost as lost:
            checkpoint.keep(ctx, models, optimizers, state)
            raise RunFailed(f"{lost.message}; the state before it is kept, continue with --resume") from lost
        with logbook.timed("reward"):
            found, failures = ppo_rollout.score(
                ctx, recipe, sources, asked, mine, step + 1, state["failures"], encoder
            )
        right = right_rows(found)
        own = [gold[prompt.sample.id] for prompt in asked if prompt.sample.id in gold]
        with logbook.timed("train"):
            losses = train_batch(ctx, policy, own, right, share, recipe.train.tokens_per_microbatch)
            refuse_non_finite(step + 1, "loss/sft", losses["loss/sft"])
            lr = optimizer.current_lr()
            norm = clip_and_step([optimizer], recipe.optim.max_grad_norm)[0]
            refuse_non_finite(step + 1, "grad_norm", norm)
        with logbook.timed("sync"):
            synced = engine.sync(policy, step + 1)

        tokens = sum(len(trajectory.response_ids) for trajectory in found)
        state = {"step": step + 1, "tokens": state["tokens"] + tokens, "failures": failures}
        metrics = losses | ppo_rollout.means(found) | synced
        metrics |= {"grad_norm": norm, "lr": lr, "tokens": state["tokens"], "samples": len(found)}
        metrics |= {"reward/failures": float(failures), "length/response": tokens / len(found)}
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
        if evaluator.due(step + 1, total):
            with logbook.timed("eval"):
                metrics |= evaluator.run(policy, engine)
        logbook.log(step + 1, metrics, force=evaluator.due(step + 1, total))
        checkpoint.step_boundary(ctx, models, optimizers, state, total)
    logbook.close()
    checkpoint.save_final(ctx, policy, total)
    for source in sources:
        source.close()
    engine.close()


def gold_rows(recipe: ReftRecipe, encoder: ChatEncoder) -> dict[str, Row]:
    """The data's own answers by row id. Raises Refused where there are none."""
    samples = load_samples(recipe.data.train, recipe.data.max_bad_rows).samples
    rows, report = encode_sft(samples, encoder, recipe.data.max_length, recipe.data.train_on)
    if not rows:
        raise Refused(
            f"method online_st trains on the data's own answers too, and there are none: {report.sentence()}"
        )
    return {row.id: (row.ids, [place for place, on in enumerate(row.mask) if on and place]) for row in rows}


def right_rows(trajectories: Sequence[Trajectory]) -> list[Row]:
    """The distinct answers that a verifier calls correct, whole ones. Raises Refused where no source says."""
    if not any("correct" in each.reward_metrics for each in trajectories):
        raise Refused(
            "no reward source says whether an answer is correct (no metric `correct`): give a verifier"
        )
    kept = {
        (each.sample_id, tuple(each.response_ids)): (each.ids, each.trained)
        for each in trajectories
        if each.reward_metrics.get("correct") and not each.truncated
    }
    return list(kept.values())


def train_batch(
    ctx: RunContext, policy: nn.Module, gold: list[Row], right: list[Row], share: float, budget: int
) -> dict[str, float]:
    """Forward and backward over this rank's rows of both kinds; the loss and its two means over all ranks."""
    rows = gold + right
    counts = [sum(len(trained) for _, trained in part) for part in (gold, right)]
    factors = [share / max(1, counts[0]), (1.0 - share) / max(1, counts[1])]
    ids, trained = [row[0] for row in rows], [row[1] for row in rows]
    lengths = [len(row) for row in ids]
    trunk, weight = backbone(policy), head_weight(policy)
    bucket = shape_bucket(weight.dtype, weight.device)
    sums = {"gold": 0.0, "right": 0.0}
    # One kind a pack: each mean is a metric.
    for kind, members in (("gold", range(len(gold))), ("right", range(len(gold), len(rows)))):
        mine = split_over_ranks(list(members), lengths, ctx.world)[ctx.rank]
        factor = factors[kind == "right"]
        for packed in plan_packs(mine, lengths, budget):
            batch = pack(packed, ids, trained, weight.device, bucket)
            weights = torch.full((len(batch.targets),), factor, device=weight.device)
            loss = weighted_nll(hidden_at_predictors(trunk, batch), weight, batch.targets, weights)
            loss.backward()
            sums[kind] += float(loss.detach())
    sums = sum_over_ranks(sums)
    found = {"loss/sft": sums["gold"] + sums["right"], "loss/gold": sums["gold"] / share}
    if right:
        found["loss/right"] = sums["right"] / (1.0 - share)
    return found | {"groups/right_kept": float(len(right))}
