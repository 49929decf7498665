"""The last layer's attention of the scored token, beside the score, in the one forward pass that gives it.

sdpa gives no attention weights; those of one position a document are a row of a product, and cost nothing:

    a_ht = softmax_t( q_h . k_t * scale ),  t <= the scored token, within the layer's window if it has one
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhfctl.models.attention import Layout
from rlhfctl.models.load import config_of
from rlhfctl.models.packing import pack_reading, plan_packs
from rlhfctl.models.reward_model import RewardModel


@dataclass(slots=True)
class Reader:
    """A layout that keeps, in layer `layer`, what the positions reads[i] of the pack attend to, from starts[i] on."""

    inner: Layout
    layer: int
    starts: list[int]
    reads: list[int]
    found: list[Tensor] = field(default_factory=list)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        if layer == self.layer:
            groups = query.shape[1] // key.shape[1]
            for start, read in zip(self.starts, self.reads, strict=True):
                keys = key[0, :, start : read + 1].repeat_interleave(groups, dim=0).float()  # (H, L, D)
                scores = (keys @ query[0, :, read].float().unsqueeze(-1)).squeeze(-1) * scale
                if window is not None:
                    scores[:, : max(0, scores.shape[1] - window)] = float("-inf")
                self.found.append(scores.softmax(-1).cpu())
        return self.inner.attend(layer, query, key, value, scale, window)


@torch.no_grad()
def scores_and_attention(
    model: RewardModel, rows: Sequence[list[int]], reads: Sequence[int], budget: int
) -> tuple[list[float], list[Tensor]]:
    """The head at token reads[i] of row i, without mean and std, and that token's attention [H, reads[i] + 1]."""
    device = model.head.weight.device
    last = int(config_of(model.trunk).num_hidden_layers) - 1
    values, weights = [0.0] * len(rows), [torch.empty(0)] * len(rows)
    places = [[read] for read in reads]
    for members in plan_packs(range(len(rows)), [len(row) for row in rows], budget):
        batch = pack_reading(members, rows, places, device)
        ends = batch.predictors.tolist()
        starts = [end - reads[row] for end, row in zip(ends, batch.rows, strict=True)]
        reader = Reader(batch.layout, last, starts, ends)
        out = model.trunk(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, layout=reader
        ).last_hidden_state[0]
        found = (model.head(out[batch.predictors]) + model.bias).tolist()
        for place, row in enumerate(batch.rows):
            values[row], weights[row] = found[place], reader.found[place]
    return values, weights
