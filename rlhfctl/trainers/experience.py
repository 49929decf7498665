"""From scored trajectories to what the loss needs: old log-probabilities, values, advantages, returns.

B trajectories, T the longest response; tensors [B, T] are right-padded, mask says which entries are tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfctl.algorithms.advantages import discounted_returns, group_advantages
from rlhfctl.algorithms.gae import gae, whiten
from rlhfctl.algorithms.kl import kl
from rlhfctl.algorithms.masking import length_mask
from rlhfctl.algorithms.rewards_to_tokens import token_rewards
from rlhfctl.models.packing import Pack, pack, plan_packs, split_over_ranks
from rlhfctl.recipe.sections import Algorithm
from rlhfctl.trainers.distributed import gather_lists
from rlhfctl.trainers.trajectory import Trajectory


@dataclass(slots=True)
class Experience:
    """The global batch of one step, the same on every rank."""

    trajectories: list[Trajectory]
    mask: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    zero_variance_groups: int
    groups: int = 0  # prompts compared within themselves; 0 without a group estimator
    old_known: bool = True  # False: the first pass of the update fills old_logprobs in

    @property
    def ids(self) -> list[list[int]]:
        return [trajectory.ids for trajectory in self.trajectories]

    @property
    def trained(self) -> list[range]:
        return [trajectory.trained for trajectory in self.trajectories]

    @property
    def lengths(self) -> list[int]:
        return [len(trajectory.ids) for trajectory in self.trajectories]

    @property
    def response_lengths(self) -> list[int]:
        return [len(trajectory.response_ids) for trajectory in self.trajectories]


def pad(rows: Sequence[Tensor]) -> Tensor:
    """[T_b] each -> [B, T], zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def score_tokens(
    trajectories: list[Trajectory],
    forward: Callable[[Pack], Tensor],
    rank: int,
    world: int,
    budget: int,
    device: torch.device,
    bucket: int = 1,
) -> Tensor:
    """One number per response token, [B, T] on every rank: each rank runs `forward` (Pack -> [N]) on its share."""
    ids = [trajectory.ids for trajectory in trajectories]
    trained = [trajectory.trained for trajectory in trajectories]
    lengths = [len(row) for row in ids]
    mine = split_over_ranks(range(len(ids)), lengths, world)[rank]
    found: list[tuple[int, Tensor]] = []
    with torch.no_grad():
        for members in plan_packs(mine, lengths, budget):
            batch = pack(members, ids, trained, device, bucket)
            parts = forward(batch).float().cpu().split(batch.counts)
            found += list(zip(members, parts, strict=True))
    by_row = dict(gather_lists(found))
    return pad([by_row[row] for row in range(len(ids))])


def build(
    trajectories: list[Trajectory],
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    algorithm: Algorithm,
    n: int,
) -> Experience:
    """Advantages by `algorithm.advantage`. Rows [B, T] belong to `trajectories`, in order of index; a prompt's samples
    whose reward failed are absent, and its group is compared without them."""
    lengths = torch.tensor([len(trajectory.response_ids) for trajectory in trajectories])
    mask = length_mask(lengths, int(lengths.max()))
    scores = torch.tensor([trajectory.shaped for trajectory in trajectories])
    penalty = None
    if ref_logprobs is not None and algorithm.kl_in == "reward":
        penalty = torch.where(mask, kl(old_logprobs, ref_logprobs, algorithm.kl_estimator or "k1"), 0.0)

    returns, zero_variance, groups = None, 0, 0
    per_token = algorithm.advantage in ("gae", "reinforce")
    if per_token:
        rewards = token_rewards(scores, mask, penalty, algorithm.kl_coef)
        if algorithm.advantage == "gae":
            assert values is not None
            advantages, returns = gae(rewards, values, mask, algorithm.gamma, algorithm.gae_lambda)
        else:
            advantages = discounted_returns(rewards, mask, algorithm.gamma)
    else:
        # The penalty of the whole response belongs to the score that the group is compared by.
        totals = scores if penalty is None else scores - algorithm.kl_coef * penalty.sum(1)
        index = torch.tensor([trajectory.index for trajectory in trajectories])
        groups = int(index.max()) // n + 1
        padded = torch.zeros(groups * n).index_copy(0, index, totals)
        valid = torch.zeros(groups * n, dtype=torch.bool).index_fill(0, index, True)
        estimator, eps = algorithm.advantage, algorithm.group_std_eps
        found, _ = group_advantages(padded, n, estimator, eps, valid)
        advantages = found[index][:, None] * mask
        # Counted on the scores alone: the penalty differs between samples that earned the same.
        plain = torch.zeros(groups * n).index_copy(0, index, scores)
        _, zero_variance = group_advantages(plain, n, estimator, eps, valid)
    wanted = algorithm.whiten_advantages
    if wanted is None:
        wanted = (
            per_token or algorithm.advantage == "reinforce_baseline"
        )  # REINFORCE++ and its baseline variant
    if wanted:
        advantages = whiten(advantages, mask)
    return Experience(
        trajectories=trajectories,
        mask=mask,
        rollout_logprobs=pad([trajectory.logprobs for trajectory in trajectories]),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        advantages=advantages,
        returns=returns,
        zero_variance_groups=zero_variance,
        groups=groups,
    )
