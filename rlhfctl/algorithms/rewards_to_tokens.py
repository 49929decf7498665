"""From one score per response to one reward per token.

    r_t = - kl_coef * kl_t + token_reward_t + 1[t = last] * score

Source: InstructGPT, arXiv 2203.02155, eq. 2, per token as in OpenRLHF, TRL and ReFT (arXiv 2401.08967, section 3.2).
Shapes: B samples, T response tokens, mask [B, T] is 1 on tokens that the policy produced. Units: reward; kl in nats.

1. The score stands on the last masked token of its row: the stop token, or the last token of a response that was cut.
   Observation tokens and padding behind it do not matter.
2. kl_t is an estimate of `kl.kl` on the sampled token, made with the policy of the rollout (old log-probabilities).
3. The score is final: clipping, length and truncation terms are applied before, the group baselines never here.
4. kl outside the mask is ignored; a token reward outside the mask is an error, since somebody meant it.
"""

import torch
from torch import Tensor

from rlhfctl.algorithms.masking import refuse_outside


def token_rewards(
    scores: Tensor,
    mask: Tensor,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    token_reward: Tensor | None = None,
) -> Tensor:
    """Per-token rewards [B, T], 0 outside the mask.

    scores [B]; mask, kl, token_reward [B, T]. Raises ValueError on a row without tokens (its score would be lost)
    and on a token reward outside the mask.
    """
    mask = mask.bool()
    if not bool(mask.any(1).all()):
        raise ValueError("a response has no token: its score has no place")
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    if kl is not None:
        rewards = rewards - kl_coef * torch.where(mask, kl, 0.0)
    if token_reward is not None:
        refuse_outside(token_reward, mask)
        rewards = rewards + token_reward
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1)
    rewards[torch.arange(mask.shape[0], device=mask.device), last] += scores
    return rewards
