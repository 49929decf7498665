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
) -> Tensor:
    """One number per response token, [B, T] on every rank: each rank runs `forward` (Pack -> [N]) on its share."""
    ids = [trajectory.ids for trajectory in trajectories]
    trained = [trajectory.trained for trajectory in trajectories]
    lengths = [len(row) for row in ids]
    mine = split_over_ranks(range(len(ids)), lengths, world)[rank]
    found: list[tuple[int, Tensor]] = []
    with torch.no_grad():
        for members in plan_packs(mine, lengths, budget):
            batch = pack(members, ids, trained, device)
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
    """Advantages by `algorithm.advantage`. trajectories: all samples of a prompt, side by side; none without reward."""
    lengths = torch.tensor([len(trajectory.response_ids) for trajectory in trajectories])
    mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).float()
    scores = torch.tensor([trajectory.shaped for trajectory in trajectories])
    penalty = torch.zeros_like(mask)
    if ref_logprobs is not None and algorithm.kl_in == "reward":
        penalty = kl(old_logprobs, ref_logprobs, algorithm.kl_estimator or "k1") * mask

    returns, zero_variance = None, 0
    if algorithm.advantage in ("gae", "reinforce"):
        rewards = token_rewards(scores, mask, penalty, algorithm.kl_coef)
        if algorithm.advantage == "gae":
            assert values is not None
            advantages, returns = gae(rewards, values, mask, algorithm.gamma, algorithm.gae_lambda)
        else:
            advantages = discounted_returns(rewards, mask, algorithm.gamma)
        whitened = True
    else:
        # The penalty of the whole response belongs to the score that the group is compared by.
        totals = scores - algorithm.kl_coef * penalty.sum(1)
        per_sample, zero_variance = group_advantages(totals, n, algorithm.advantage, algorithm.group_std_eps)
        advantages = per_sample[:, None] * mask
        whitened = False
    if algorithm.whiten_advantages if algorithm.whiten_advantages is not None else whitened:
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
        groups=0 if algorithm.advantage in ("gae", "reinforce") else len(trajectories) // n,
    )
