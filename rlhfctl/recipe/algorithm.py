"""The `algorithm` section of ppo: which loss, which advantages, how strong the KL."""

from typing import Literal

from pydantic import Field, model_validator

from rlhfctl.recipe.sections import Fraction, NonNegative, Positive, Section


class Algorithm(Section):
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_baseline", "prime"] = Field(
        "gae", description="advantage estimator"
    )
    loss: Literal["clip", "gspo"] = Field(
        "clip", description="clip: a ratio per token (PPO); gspo: one ratio per response"
    )
    ppo_epochs: Positive = Field(1, description="passes over each batch of rollouts")
    minibatches: Positive = Field(1, description="optimizer steps per pass")
    clip_epsilon: float = Field(0.2, gt=0, lt=1, description="ratio clip, lower side (and upper by default)")
    clip_epsilon_high: float | None = Field(None, gt=0, description="ratio clip, upper side")
    dual_clip: float | None = Field(
        None, gt=1, description="bound c of the dual clip for negative advantages"
    )
    value_clip: float | None = Field(0.2, gt=0, description="value clip; null: off")
    value_coef: float = Field(1.0, ge=0, description="factor of the value loss with a shared trunk")
    value_warmup_steps: NonNegative = Field(
        0, description="first steps that train the value model alone; the policy does not move"
    )
    entropy_coef: float = Field(
        0.0, ge=0, description="strength of the entropy bonus in the loss, exact over the vocabulary"
    )
    kl_coef: float = Field(
        0.05, ge=0, description="strength of the KL penalty to the reference; 0: no reference"
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = Field(
        None, description="default: k1 in the reward, k3 in the loss"
    )
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the KL penalty goes")
    kl_target: float | None = Field(
        None, gt=0, description="adapt the coefficient so that kl/reference nears this; kl_coef is its start"
    )
    kl_horizon: Positive = Field(
        10000, description="samples over which an adapted coefficient moves by at most a fifth"
    )
    kl_limit: float | None = Field(None, gt=0, description="stop the run when kl/reference passes this")
    gamma: Fraction = Field(1.0, description="discount")
    gae_lambda: Fraction = Field(0.95, description="GAE lambda")
    whiten_advantages: bool | None = Field(
        None,
        description="zero mean, unit variance over the batch; default: for gae, reinforce, reinforce_baseline",
    )
    group_std_eps: float = Field(1e-4, gt=0, description="added to the group's standard deviation (grpo)")
    loss_mean: Literal["token", "sequence", "constant"] = Field(
        "token", description="over all tokens, per sample first, or divided by batch x max_new_tokens"
    )
    importance_correction: Literal["none", "tis", "icepop", "sequence_mask"] = Field(
        "none",
        description="weight tokens by trainer / sampler probability; tis: capped; icepop: tokens outside "
        "importance_bounds get none; sequence_mask: capped, responses outside importance_bounds get none",
    )
    importance_cap: float = Field(2.0, gt=0, description="cap of the weight (tis, sequence_mask)")
    importance_bounds: tuple[float, float] | None = Field(
        None,
        description="[low, high] of the ratio (icepop, default .5 and 5) or of its geometric mean over a "
        "response (sequence_mask, default .9 and 1.1)",
    )
    old_logprobs: Literal["auto", "sampler", "recompute"] = Field(
        "auto", description="where old log-probabilities come from; auto: the sampler's where it is exact"
    )

    @model_validator(mode="after")
    def bounds_are_bounds(self) -> "Algorithm":
        if (
            self.importance_bounds is not None
            and not 0 <= self.importance_bounds[0] <= self.importance_bounds[1]
        ):
            raise ValueError("algorithm.importance_bounds is [low, high] with 0 <= low <= high")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """importance_bounds with its default."""
        return self.importance_bounds or (
            (0.5, 5.0) if self.importance_correction == "icepop" else (0.9, 1.1)
        )
