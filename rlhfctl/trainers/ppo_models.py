"""The models of one ppo run: policy, reference, critic; and their optimizers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhfctl.models.head import token_logprobs
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors, load_causal_lm
from rlhfctl.models.lora import adapters_off, add_lora, own_parameters
from rlhfctl.models.packing import Pack
from rlhfctl.models.value import Critic, load_critic
from rlhfctl.recipe.sections import ModelSource, ValueModel
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.engine import build_optimizer
from rlhfctl.trainers.optimizer import PLAIN, Learner, Passes

Forward = Callable[[Pack], Tensor]


@dataclass(slots=True)
class PpoModels:
    """reference: a function from a pack to log-probabilities [N], None without a KL penalty; critic: None without
    a value model. policy_passes, critic_passes: how passes are made (build_optimizers sets them).
    reference_is_policy: the reference is the policy with its adapters off."""

    policy: nn.Module
    critic: Critic | None
    reference: Forward | None
    temperature: float
    policy_passes: Passes = PLAIN
    critic_passes: Passes = PLAIN
    reference_is_policy: bool = False

    @property
    def bucket(self) -> int:
        """Tokens that packs are filled up to a multiple of."""
        weight = head_weight(self.policy)
        return shape_bucket(weight.dtype, weight.device)

    def logprobs(self, batch: Pack) -> Tensor:
        """The policy's log-probabilities [N] under the sampling temperature."""
        hidden = hidden_at_predictors(backbone(self.policy), batch)
        return token_logprobs(
            hidden, head_weight(self.policy), batch.targets, self.temperature, with_entropy=False
        )[0]

    def values(self, batch: Pack) -> Tensor:
        """V(s_t) [N], read where the policy predicts a_t."""
        assert self.critic is not None
        return self.critic(batch, backbone(self.policy))

    def logprobs_and_values(self, batch: Pack) -> Tensor:
        """[N, 2] of one forward pass through a shared trunk."""
        assert self.critic is not None
        hidden = hidden_at_predictors(backbone(self.policy), batch)
        logprobs, _ = token_logprobs(hidden, head_weight(self.policy), batch.targets, self.temperature, False)
        return torch.stack([logprobs, self.critic.head(hidden)], 1)

    def trained(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic is not None else {})


def load_models(ctx: RunContext, recipe: PpoRecipe) -> PpoModels:
    policy = load_causal_lm(recipe.policy, ctx.device, recipe.seed)
    if recipe.policy.lora is not None:
        add_lora(policy, recipe.policy.lora, recipe.seed)
    critic = None
    if recipe.algorithm.advantage == "gae":
        reward_model = next((s.path for s in recipe.reward.sources if isinstance(s, ModelSource)), None)
        spec = recipe.value_model or ValueModel()
        critic = load_critic(spec, recipe.policy, policy, ctx.device, recipe.seed, reward_model)
    reference = load_reference(ctx, recipe, policy)
    off = recipe.policy.lora is not None and recipe.reference is None
    return PpoModels(policy, critic, reference, recipe.rollout.temperature, reference_is_policy=off)


def load_reference(ctx: RunContext, recipe: PpoRecipe, policy: nn.Module) -> Forward | None:
    """The frozen model of the KL penalty: the recipe's `reference`, else the policy as it starts.

    With LoRA that is the policy with its adapters off: no second copy of the weights.
    """
    if recipe.algorithm.kl_coef == 0.0:
        return None
    temperature = recipe.rollout.temperature
    if recipe.policy.lora is not None and recipe.reference is None:

        def adapters_off_logprobs(batch: Pack) -> Tensor:
            with adapters_off(policy):
                hidden = hidden_at_predictors(backbone(policy), batch)
                return token_logprobs(
                    hidden, head_weight(policy), batch.targets, temperature, with_entropy=False
                )[0]

        return adapters_off_logprobs
    spec = recipe.policy
    if recipe.reference is not None:
        spec = spec.model_copy(update={"path": recipe.reference, "from_config": None})
    frozen = load_causal_lm(spec, ctx.device, recipe.seed).requires_grad_(False).eval()

    def frozen_logprobs(batch: Pack) -> Tensor:
        hidden = hidden_at_predictors(backbone(frozen), batch)
        return token_logprobs(hidden, head_weight(frozen), batch.targets, temperature, with_entropy=False)[0]

    return frozen_logprobs


def build_optimizers(recipe: PpoRecipe, models: PpoModels, total_steps: int) -> dict[str, Learner]:
    """One for the policy (with the head of a shared trunk), one for a critic of its own."""
    limit = recipe.optim.max_grad_norm
    modules = [models.policy]
    optim, critic = recipe.optim, models.critic
    named = [(f"policy.{name}", parameter) for name, parameter in own_parameters(models.policy)]
    if critic is not None and critic.shares_hidden:
        named += [(f"critic.{name}", parameter) for name, parameter in critic.named_parameters()]
        modules.append(critic)
    policy = build_optimizer(recipe, modules, named, optim.lr, total_steps, limit)
    models.policy_passes, optimizers = policy, {"policy": policy}
    if critic is not None and not critic.shares_hidden:
        lr = (recipe.value_model.lr if recipe.value_model else None) or optim.lr
        optimizers["critic"] = build_optimizer(
            recipe, [critic], critic.named_parameters(), lr, total_steps, limit
        )
        models.critic_passes = optimizers["critic"]
    return optimizers
