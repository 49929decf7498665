"""The sections of a recipe that reft alone has, or has with other defaults."""

from typing import Literal

from pydantic import Field, model_validator

from rlhfctl.recipe.algorithm import Algorithm
from rlhfctl.recipe.sections import Fraction, Positive, Section


class ReftAlgorithm(Algorithm):
    """The `algorithm` section of reft: ReFT's own defaults."""

    ppo_epochs: Positive = Field(2, description="passes over each batch of rollouts")
    value_coef: float = Field(5.0, ge=0, description="factor of the value loss with a shared trunk")
    loss_mean: Literal["token", "sequence", "constant"] = Field(
        "sequence", description="over all tokens, per sample first, or divided by batch x max_new_tokens"
    )


class SelfTraining(Section):
    """Baselines of the ReFT paper: supervised fine-tuning on a policy's own right answers."""

    samples: Positive = Field(
        100, description="offline_st: samples of each question from the warm-up's model"
    )
    keep: Positive = Field(10, description="offline_st: most distinct right samples of a question")
    gold_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="online_st: weight of the data's own answers in the loss; the rest is the samples'",
    )


class Warmup(Section):
    """Supervised fine-tuning on the same rows, before reft samples from them."""

    steps: Positive | None = Field(None, description="optimizer steps of the warm-up")
    epochs: Positive | None = Field(None, description="passes over the data instead of steps")
    batch_size: Positive = Field(48, description="rows per step over all ranks")
    lr: float = Field(1e-5, gt=0, description="peak learning rate of the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="after the first steps, down to optim.min_lr_ratio"
    )
    warmup_ratio: Fraction = Field(0.1, description="share of its steps over which the learning rate rises")

    @model_validator(mode="after")
    def one_length(self) -> "Warmup":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either warmup.steps or warmup.epochs (the other one null)")
        return self
