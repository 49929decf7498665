"""The value model: a backbone and one linear head, V(s_t) read where the policy predicts a_t.

Value-head rule: a head is always created; replaced when the checkpoint holds one; kept (at zero) when it does not.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models.load import (
    backbone,
    config_of,
    hidden_at_predictors,
    load_causal_lm,
    load_trunk,
    resolve_dtype,
)
from rlhfctl.models.packing import Pack
from rlhfctl.models.value_head import ValueHead, read_head
from rlhfctl.recipe.sections import Policy, ValueModel


class Critic(nn.Module):
    """trunk None: the head sits on the policy's own hidden states (shared trunk)."""

    def __init__(self, trunk: nn.Module | None, hidden_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ValueHead(hidden_size)

    def forward(self, pack: Pack, policy_trunk: nn.Module) -> Tensor:
        """Values [N] at the pack's predictors."""
        return self.head(hidden_at_predictors(self.trunk or policy_trunk, pack))


def load_critic(
    spec: ValueModel,
    policy_spec: Policy,
    policy: nn.Module,
    device: torch.device,
    seed: int,
    reward_model: str | None,
) -> Critic:
    """Build the critic the recipe asks for.

    init: policy (a copy as it starts), reward_model (the first reward model of the recipe), or a checkpoint directory.
    """
    if spec.init == "reward_model" and reward_model is None:
        raise Refused("value_model.init is reward_model, but the recipe has no reward source of kind model")
    source = {"policy": None, "reward_model": reward_model}.get(spec.init, spec.init)
    if spec.shared_trunk:
        critic = Critic(None, config_of(policy).hidden_size)
    elif source is None:
        copy = load_causal_lm(policy_spec, device, seed)
        critic = Critic(backbone(copy), config_of(copy).hidden_size)
    else:
        dtype = resolve_dtype(policy_spec.dtype, device)
        checkpointing = policy_spec.gradient_checkpointing
        trunk = load_trunk(source, dtype, device, policy_spec.trust_remote_code, checkpointing)
        critic = Critic(trunk, config_of(trunk).hidden_size)
    width = critic.head.weight.shape[1]
    head = read_head(Path(source)) if source is not None and spec.head == "auto" else None
    if head is not None:
        if head.shape[1] != width:
            raise Refused(f"the value head of {source} is {head.shape[1]} wide, the model {width}")
        critic.head.weight.data.copy_(head)
    elif spec.head == "normal":
        generator = torch.Generator().manual_seed(seed)
        critic.head.weight.data.copy_(torch.randn(1, width, generator=generator) / width**0.5)
    return critic.to(device)
