"""The value model: a backbone and one linear head, V(s_t) read where the policy predicts a_t.

With LoRA on both, policy, reference and value model are one copy of the weights: adapters are switched.

Value-head rule: a head is always created; replaced when the checkpoint holds one; kept (at zero) when it does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models.hub import local_directory
from rlhfctl.models.load import (
    backbone,
    config_of,
    hidden_at_predictors,
    load_causal_lm,
    load_trunk,
    resolve_dtype,
)
from rlhfctl.models.lora import POLICY, VALUE, acting, adapter_parameters, add_lora, switch
from rlhfctl.models.packing import Pack
from rlhfctl.models.value_head import ValueHead, read_config, read_head
from rlhfctl.recipe.sections import Policy, ValueModel


class Critic(nn.Module):
    """What the values are read from:

    trunk            a backbone of its own
    host             the policy's backbone, with an adapter of the value model's own acting in place of the policy's
    neither          the policy's hidden states as they are (shared trunk)
    """

    def __init__(self, trunk: nn.Module | None, hidden_size: int, host: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ValueHead(hidden_size)
        self._host = [] if host is None else [host]  # in a list: not a part, so not among the parameters
        self.adapter: nn.ParameterDict | None = None
        if host is not None:
            parameters = adapter_parameters(host, VALUE)
            self.adapter = nn.ParameterDict({name.replace(".", "/"): p for name, p in parameters.items()})

    @property
    def shares_hidden(self) -> bool:
        """Whether the head reads the hidden states that the policy computes anyway."""
        return self.trunk is None and not self._host

    @property
    def backbone(self) -> nn.Module | None:
        """What the hidden states come from; of a host only inside `acting`."""
        return self._host[0] if self._host else self.trunk

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Inside, a host is the value model: for its forward pass, and for a backward pass that runs it again."""
        with acting(self._host[0], [VALUE]) if self._host else nullcontext():
            yield

    def forward(self, pack: Pack, policy_trunk: nn.Module) -> Tensor:
        """Values [N] at the pack's predictors."""
        with self.acting():
            return self.head(hidden_at_predictors(self.backbone or policy_trunk, pack))


def load_critic(
    spec: ValueModel,
    policy_spec: Policy,
    policy: nn.Module,
    device: torch.device,
    seed: int,
    reward_model: str | None,
) -> Critic:
    """Build the critic the recipe asks for; after the policy got its adapter, if it has one.

    init: policy (a copy as it starts), reward_model (the first reward model of the recipe), or a checkpoint directory.
    lora: the backbone is frozen under an adapter; the policy's own backbone where it is frozen too.
    """
    if spec.init == "reward_model" and reward_model is None:
        raise Refused("value_model.init is reward_model, but the recipe has no reward source of kind model")
    source = {"policy": None, "reward_model": reward_model}.get(spec.init, spec.init)
    if spec.shared_trunk:
        critic = Critic(None, config_of(policy).hidden_size)
    elif source is None and spec.lora is not None and policy_spec.lora is not None:
        # Another start than the policy's adapter, which has the same seed.
        add_lora(policy, spec.lora, seed + 1, VALUE)
        switch(policy, [POLICY])
        critic = Critic(None, config_of(policy).hidden_size, backbone(policy))
    elif source is None:
        copy = load_causal_lm(policy_spec, device, seed)
        critic = Critic(backbone(copy), config_of(copy).hidden_size)
    else:
        dtype = resolve_dtype(policy_spec.dtype, device)
        checkpointing = policy_spec.gradient_checkpointing
        trunk = load_trunk(source, dtype, device, policy_spec.trust_remote_code, checkpointing)
        critic = Critic(trunk, config_of(trunk).hidden_size)
    width = critic.head.weight.shape[1]
    head = None
    if source is not None and spec.head == "auto":
        directory = local_directory(source)
        refuse_other_value(directory)
        head = read_head(directory)
    if head is not None:
        if head.shape[1] != width:
            raise Refused(f"the value head of {source} is {head.shape[1]} wide, the model {width}")
        critic.head.weight.data.copy_(head)
    elif spec.head == "normal":
        generator = torch.Generator().manual_seed(seed)
        critic.head.weight.data.copy_(torch.randn(1, width, generator=generator) / width**0.5)
    if spec.lora is not None and critic.trunk is not None:
        add_lora(critic.trunk, spec.lora, seed + 1)
    return critic.to(device)


def refuse_other_value(directory: Path) -> None:
    """Raises Refused for a value that was fitted for search: V here is a reward, read by one row at the last state."""
    facts = read_config(directory).get("value_model")
    if not isinstance(facts, dict):
        return
    kinds = {
        "a sum over the response's tokens": facts.get("head") == "token_sum",
        "a logit of success": facts.get("link") == "logistic",
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    if kind is not None:
        raise Refused(
            f"the value of {directory} is {kind}, fitted for search, and no head to start from: set "
            "value_model.head to zero for its backbone alone, or give the critic/ of its run"
        )
