"""Trajectories of an oreo run, and the frozen reference's hidden states on them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhfctl.data.encode_offline import (
    OfflineRow,
    refuse_nothing_to_learn,
    step_report,
)
from rlhfctl.data.prepared import oreo_preparation
from rlhfctl.errors import Refused, is_disk_full
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import backbone, config_of, head_weight, hidden_at_predictors, load_causal_lm
from rlhfctl.models.lora import adapters_off
from rlhfctl.models.packing import Pack, pack, plan_packs
from rlhfctl.recipe.tasks import OreoRecipe
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import barrier
from rlhfctl.trainers.order import BatchOrder
from rlhfctl.trainers.reference_cache import file_of, read, row_keys, write


@dataclass(slots=True)
class OreoData:
    """ids[i], trained[i]: tokens of row i and the indices of its actions; order: what step s trains on."""

    rows: list[OfflineRow]
    ids: list[list[int]]
    trained: list[list[int]]
    lengths: list[int]
    order: BatchOrder


def load_trajectories(ctx: RunContext, recipe: OreoRecipe, encoder: ChatEncoder) -> OreoData:
    made = oreo_preparation(recipe, recipe.data.train, encoder).make()
    rows, report = made.rows, made.report
    if not rows:
        raise Refused(f"no row of {recipe.data.train[0].path} can be used: {report.sentence()}")
    refuse_nothing_to_learn(rows, recipe.algorithm)
    ctx.say(step_report(rows) + ("" if not report.dropped else f"; {report.sentence()}"))
    order = BatchOrder(made.sources, made.places(), recipe.seed, recipe.train.batch_size, recipe.data.shuffle)
    return OreoData(
        rows=rows,
        ids=[row.ids for row in rows],
        trained=[[index for index, on in enumerate(row.mask) if on] for row in rows],
        lengths=[len(row.ids) for row in rows],
        order=order,
    )


class Reference:
    """The frozen policy that KL is measured to: the recipe's `reference`, else the policy as it starts.

    With LoRA and no `reference` that is the policy with its adapters off. unmoved: policy and reference are one until
    the policy's first step.
    """

    def __init__(self, ctx: RunContext, recipe: OreoRecipe, policy: nn.Module) -> None:
        self.unmoved = recipe.reference is None
        self.switched = recipe.policy.lora is not None and recipe.reference is None
        spec = recipe.policy
        if recipe.reference is not None:
            spec = spec.model_copy(update={"path": recipe.reference, "from_config": None})
        self.spec, self.model = spec, policy
        if not self.switched:
            self.model = load_causal_lm(spec, ctx.device, recipe.seed).requires_grad_(False).eval()
        ours, theirs = (config_of(model).vocab_size for model in (policy, self.model))
        if ours != theirs:
            raise Refused(
                f"reference {recipe.reference} has a vocabulary of {theirs} tokens, the policy one of {ours}: their "
                "distributions cannot be compared"
            )
        self.cache: list[Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        return head_weight(self.model)

    @torch.no_grad()
    def hidden(self, batch: Pack) -> Tensor:
        """Last hidden states [N, H] where the pack's tokens are predicted."""
        if self.cache is not None:
            return torch.cat([self.cache[row] for row in batch.rows]).to(self.weight.device)
        return self._computed(batch)

    def _computed(self, batch: Pack) -> Tensor:
        if self.switched:
            with adapters_off(self.model):
                return hidden_at_predictors(backbone(self.model), batch)
        return hidden_at_predictors(backbone(self.model), batch)

    @torch.no_grad()
    def fill(
        self, ctx: RunContext, data: OreoData, limit_mb: int, budget: int, directory: str | None = None
    ) -> None:
        """Compute every row once, where the result fits. Packs depend on the data alone, so a resumed run gets the same
        numbers. directory: where rows are kept between runs."""
        weight = self.weight
        tokens = sum(len(trained) for trained in data.trained)
        size = tokens * weight.shape[1] * weight.element_size() / 2**20
        if size > limit_mb:
            ctx.say(
                f"reference: computed at every step (its cache would take {size:.0f} MiB, "
                f"algorithm.reference_cache_mb is {limit_mb})"
            )
            return
        file = None if directory is None else file_of(directory, self.spec, str(weight.dtype))
        keys = [] if file is None else row_keys(data.ids, data.trained)
        held = {} if file is None else read(file, keys)
        cache: list[Tensor] = [held.get(row, weight.new_empty(0)) for row in range(len(data.rows))]
        missing = [row for row in range(len(data.rows)) if row not in held]
        barrier()  # every rank has read before one of them writes
        bucket = shape_bucket(weight.dtype, weight.device)
        for members in plan_packs(missing, data.lengths, budget):
            batch = pack(members, data.ids, data.trained, weight.device, bucket)
            for row, part in zip(members, self._computed(batch).cpu().split(batch.counts), strict=True):
                cache[row] = part.clone()
        if file is not None:
            ctx.say(f"reference: {len(held)} of {len(cache)} rows from {file}")
            if missing and ctx.rank == 0:
                try:
                    write(file, [keys[row] for row in missing], [cache[row] for row in missing])
                except Exception as error:  # safetensors hides an OSError in one of its own
                    if not isinstance(error, OSError) and not is_disk_full(error):
                        raise
                    ctx.say(f"reference: {file} cannot be written ({error}); the run goes on without it")
        self.cache = cache
