"""From scored trajectories to what the loss needs: old log-probabilities, values, advantages, returns.

B trajectories, T the longest response; tensors [B, T] are right-padded, mask says which entries are tokens that the
policy wrote: neither padding nor observations between its turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhfctl.algorithms.advantages import discounted_returns, group_advantages
from rlhfctl.algorithms.gae import gae, whiten
from rlhfctl.algorithms.implicit_prm import prime_advantages
from rlhfctl.algorithms.kl import kl
from rlhfctl.algorithms.redistribution import redistribute
from rlhfctl.algorithms.rewards_to_tokens import token_rewards
from rlhfctl.models.packing import Pack
from rlhfctl.models.shared_prefix import Sharing
from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.recipe.sections import Shaping
from rlhfctl.trainers.distributed import gather_lists
from rlhfctl.trainers.engine import passes
from rlhfctl.trainers.optimizer import PLAIN, Passes
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
    rewards: Tensor | None = None  # per token, None with group estimators
    sum_error: float = (
        0.0  # largest difference of a response's rewards from its score, token rewards and penalty
    )
    groups: int = 0  # prompts compared within themselves; 0 without a group estimator
    kl_coef: float = 0.0  # of this step: it moves with algorithm.kl_target
    value_sums: dict[str, float] | None = None  # this rank's, where the value model is trained already
    old_known: bool = True  # False: the first pass of the update fills old_logprobs in

    @property
    def ids(self) -> list[list[int]]:
        return [trajectory.ids for trajectory in self.trajectories]

    @property
    def trained(self) -> list[list[int]]:
        return [trajectory.trained for trajectory in self.trajectories]

    @property
    def lengths(self) -> list[int]:
        return [len(trajectory.ids) for trajectory in self.trajectories]

    @property
    def response_lengths(self) -> list[int]:
        """Tokens that the policy wrote."""
        return [len(trajectory.trained) for trajectory in self.trajectories]


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
    learner: Passes = PLAIN,
) -> Tensor:
    """One number per token of the policy, 0 elsewhere: [B, T] on every rank. Each rank runs `forward` (Pack -> [N]) on
    its share. Several numbers each where `forward` gives [N, K]: [B, T, K]. learner: how passes of the model are made;
    of one in parts (ZeRO-3) all ranks make equally many."""
    sharing = sharing_of(trajectories)
    found: list[tuple[int, Tensor]] = []
    with torch.no_grad():
        for members, counts in passes([learner], sharing.plan(range(len(trajectories)), budget, rank, world)):
            batch = sharing.pack(members, device, bucket)
            numbers = learner.run(partial(forward, batch))
            if counts:
                found += list(zip(batch.rows, numbers.float().cpu().split(batch.counts), strict=True))
    by_row = dict(gather_lists(found))
    return pad([spread_out(by_row[row], trajectory.mask) for row, trajectory in enumerate(trajectories)])


def sharing_of(trajectories: Sequence[Trajectory]) -> Sharing:
    """Samples of one prompt share its forward pass."""
    return Sharing(
        [trajectory.ids for trajectory in trajectories],
        [trajectory.trained for trajectory in trajectories],
        [len(trajectory.prompt_ids) for trajectory in trajectories],
    )


def spread_out(values: Tensor, mask: Tensor) -> Tensor:
    """values [N] or [N, K], one row per True of the mask [T] -> [T] or [T, K], 0 where it is False."""
    spread = torch.zeros(len(mask), *values.shape[1:], dtype=values.dtype)
    spread[mask] = values
    return spread


def build(
    trajectories: list[Trajectory],
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor | Callable[[Tensor, Tensor], Tensor] | None,
    algorithm: Algorithm,
    n: int,
    shaping: Shaping | None = None,
    process: tuple[Tensor, float] | None = None,
    kl_coef: float | None = None,
) -> Experience:
    """Advantages by `algorithm.advantage`. Rows [B, T] belong to `trajectories`, in order of index; a prompt's samples
    whose reward failed are absent, and its group is compared without them. shaping: for its redistribution. process:
    rewards [B, T] of an implicit process reward model and their factor (prime). values: [B, T], or what gives them from
    the rewards and the mask. kl_coef: of this step, else the recipe's."""
    kl_coef = algorithm.kl_coef if kl_coef is None else kl_coef
    mask = pad([trajectory.mask for trajectory in trajectories])
    scores = torch.tensor([trajectory.shaped for trajectory in trajectories])
    penalty = None
    if ref_logprobs is not None and algorithm.kl_in == "reward":
        penalty = torch.where(mask, kl(old_logprobs, ref_logprobs, algorithm.kl_estimator or "k1"), 0.0)

    returns, rewards, zero_variance, groups = None, None, 0, 0
    sum_error = 0.0
    per_token = algorithm.advantage in ("gae", "reinforce")
    if per_token:
        dense, left = dense_rewards(trajectories, scores, mask, shaping or Shaping())
        rewards = token_rewards(left, mask, penalty, kl_coef, dense)
        if dense is not None:
            wanted_sums = scores if redistributes(shaping) else scores + dense.sum(1)
            if penalty is not None:
                wanted_sums = wanted_sums - kl_coef * penalty.sum(1)
            sum_error = float((rewards.sum(1) - wanted_sums).abs().max())
        if algorithm.advantage == "gae":
            assert values is not None
            values = values if isinstance(values, Tensor) else values(rewards, mask)
            advantages, returns = gae(rewards, values, mask, algorithm.gamma, algorithm.gae_lambda)
        else:
            advantages = discounted_returns(rewards, mask, algorithm.gamma)
    else:
        # The penalty of the whole response belongs to the score that the group is compared by.
        totals = scores if penalty is None else scores - kl_coef * penalty.sum(1)
        index = torch.tensor([trajectory.index for trajectory in trajectories])
        groups = int(index.max()) // n + 1
        padded = torch.zeros(groups * n).index_copy(0, index, totals)
        valid = torch.zeros(groups * n, dtype=torch.bool).index_fill(0, index, True)
        estimator, eps = algorithm.advantage, algorithm.group_std_eps
        if estimator == "prime":
            assert process is not None
            rows = torch.zeros(groups * n, mask.shape[1]).index_copy(0, index, process[0])
            taken = torch.zeros(groups * n, mask.shape[1], dtype=torch.bool).index_copy(0, index, mask)
            found = prime_advantages(rows, padded, taken, n, process[1], algorithm.gamma, valid)
            advantages, rewards = found[index], process[0]
            estimator = "rloo"  # whose groups are counted below
        else:
            found, _ = group_advantages(padded, n, estimator, eps, valid)
            advantages = found[index][:, None] * mask
        # Counted on the scores alone: the penalty differs between samples that earned the same.
        plain = torch.zeros(groups * n).index_copy(0, index, scores)
        _, zero_variance = group_advantages(plain, n, estimator, eps, valid)
    wanted = algorithm.whiten_advantages
    if wanted is None:
        # REINFORCE++ and its baseline variant.
        wanted = per_token or algorithm.advantage == "reinforce_baseline"
    if wanted:
        advantages = whiten(advantages, mask)
    return Experience(
        trajectories=trajectories,
        mask=mask,
        rollout_logprobs=pad([trajectory.logprobs for trajectory in trajectories]),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values if isinstance(values, Tensor) else None,
        advantages=advantages,
        returns=returns,
        zero_variance_groups=zero_variance,
        rewards=rewards,
        sum_error=sum_error,
        groups=groups,
        kl_coef=kl_coef,
    )


def redistributes(shaping: Shaping | None) -> bool:
    return shaping is not None and shaping.redistribution != "none"


def dense_rewards(
    trajectories: list[Trajectory], scores: Tensor, mask: Tensor, shaping: Shaping
) -> tuple[Tensor | None, Tensor]:
    """(token rewards [B, T] or None, what stands on the last token [B])."""
    if all(trajectory.token_rewards is None for trajectory in trajectories):
        return None, scores
    parts = [
        torch.zeros(len(trajectory.response_ids))
        if trajectory.token_rewards is None
        else trajectory.token_rewards
        for trajectory in trajectories
    ]
    if not redistributes(shaping):
        return pad(parts), scores
    rest = torch.tensor([each.shaped if each.unspread is None else each.unspread for each in trajectories])
    return redistribute(pad(parts), scores, rest, mask, shaping.redistribution_share, shaping.preserve_total)
