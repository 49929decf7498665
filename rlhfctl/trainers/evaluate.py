"""Evaluation inside a training run: greedy answers scored by the recipe's reward, or held-out loss for sft."""

import torch
from torch import nn

from rlhfctl.data.encode import encode_prompts
from rlhfctl.data.load import load_samples
from rlhfctl.models.head import weighted_nll
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors
from rlhfctl.models.packing import pack, plan_packs, split_over_ranks
from rlhfctl.recipe.tasks import OreoRecipe, PpoRecipe, SftRecipe
from rlhfctl.rewards.build import Source, build_sources
from rlhfctl.rewards.sample import reward_sample
from rlhfctl.rewards.score import score_samples
from rlhfctl.rollout.engine import Engine
from rlhfctl.rollout.types import Request, Sampling
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import gather_lists, sum_over_ranks
from rlhfctl.trainers.sft_data import SftData, load_sft_rows

NAMES = {"correct": "accuracy", "path_correct": "path_accuracy"}


class Evaluator:
    """Holds the evaluation rows, encoded once. wanted: the recipe has data.eval."""

    def __init__(self, ctx: RunContext, encoder: ChatEncoder, sources: list[Source] | None = None) -> None:
        recipe = ctx.recipe
        assert isinstance(recipe, SftRecipe | PpoRecipe | OreoRecipe)
        self.ctx, self.encoder, self.recipe = ctx, encoder, recipe
        self.wanted = bool(recipe.data.eval)
        self.answers = self.wanted and recipe.reward is not None
        self.loss = self.wanted and recipe.task == "sft" and recipe.reward is None
        if self.answers:
            assert recipe.reward is not None
            if sources is None:
                sources = build_sources(recipe.reward, encoder, recipe.template)
            self.sources = sources
            rollout = recipe.rollout if isinstance(recipe, PpoRecipe) else recipe.evaluation_rollout()
            self.sampling = Sampling(
                rollout.max_new_tokens, 0.0, 1.0, encoder.stop_ids, 0, 0, rollout.max_batch_tokens
            )
            samples = load_samples(recipe.data.eval, recipe.data.max_bad_rows).samples
            if recipe.train.eval_samples is not None:
                samples = samples[: recipe.train.eval_samples]
            self.prompts, _ = encode_prompts(samples, encoder, rollout.max_prompt_length)
        if self.loss:
            self.rows: SftData = load_sft_rows(recipe.data.eval, recipe.data, encoder, recipe.seed, 1)
            self.members = list(range(len(self.rows.ids)))[: recipe.train.eval_samples]

    @property
    def size(self) -> int:
        """Prompts that are answered."""
        return len(self.prompts) if self.answers else 0

    def due(self, step: int, total: int) -> bool:
        every = self.recipe.train.eval_every
        return self.wanted and (step == total or (every > 0 and step % every == 0))

    def run(self, policy: nn.Module, engine: Engine) -> dict[str, float]:
        """The held-out loss is the policy's; answers are the engine's, from the weights of its last sync."""
        metrics: dict[str, float] = {}
        if self.loss:
            metrics |= self._held_out_loss(policy)
        if self.answers:
            metrics |= self._greedy_answers(engine)
        return metrics

    @torch.no_grad()
    def _held_out_loss(self, policy: nn.Module) -> dict[str, float]:
        trunk, weight = backbone(policy), head_weight(policy)
        mine = split_over_ranks(self.members, self.rows.lengths, self.ctx.world)[self.ctx.rank]
        sums = {"nll": 0.0, "tokens": 0.0}
        for members in plan_packs(mine, self.rows.lengths, self.recipe.train.tokens_per_microbatch):
            bucket = shape_bucket(weight.dtype, weight.device)
            batch = pack(members, self.rows.ids, self.rows.trained, weight.device, bucket)
            ones = torch.ones(len(batch.targets), device=weight.device)
            hidden = hidden_at_predictors(trunk, batch)
            sums["nll"] += float(weighted_nll(hidden, weight, batch.targets, ones))
            sums["tokens"] += len(batch.targets)
        sums = sum_over_ranks(sums)
        return {"eval/loss": sums["nll"] / sums["tokens"]}

    def _greedy_answers(self, engine: Engine) -> dict[str, float]:
        mine = list(range(self.ctx.rank, len(self.prompts), self.ctx.world))
        requests = [Request(index, self.prompts[index].ids) for index in mine]
        answers = engine.generate(requests, self.sampling)
        samples = [
            reward_sample(self.prompts[index].sample, self.encoder.decode_response(answer.response_ids))
            for index, answer in zip(mine, answers, strict=True)
        ]
        scored = score_samples(self.sources, samples)
        rows: list[dict[str, float]] = []
        for index, answer in enumerate(answers):
            row: dict[str, float] = {}
            for outcomes in scored.outcomes.values():  # of sources that report one name the first one counts
                row = {NAMES.get(key, key): value for key, value in outcomes[index].metrics.items()} | row
            row["response_length"] = float(len(answer.response_ids))
            total = scored.totals[index]
            if total is not None:
                row["reward"] = total
            rows.append(row)
        rows = gather_lists(rows)
        names = sorted({name for row in rows for name in row})
        # A metric is averaged over the rows that have it: a failed reward is missing, not zero.
        return {f"eval/{name}": _mean([row[name] for row in rows if name in row]) for name in names}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
