"""The guard section of ppo: what is watched while a policy learns, and what happens when it drifts."""

from typing import Literal

from pydantic import Field

from rlhfctl.recipe.sections import Positive, Section

Action = Literal["stop", "warn", "off"]


class Guard(Section):
    verifier: Action = Field(
        "stop",
        description="the reward rises and a held-out measure falls: correct answers, a source of weight 0",
    )
    format: Action = Field(
        "warn", description="the reward rises because answers can be read, and no more of them are right"
    )
    length: Action = Field("warn", description="the reward rises and the length of responses drifts")
    kl: Action = Field("warn", description="the reward rises far away from the reference")
    entropy: Action = Field("warn", description="the policy's entropy collapses")
    window: Positive = Field(5, description="steps that means are taken over")
    change: float = Field(
        0.25, gt=0, description="a rise or fall that counts, in standard deviations over samples"
    )
    length_ratio: float = Field(2.0, gt=1, description="length drifts at this many times longer or shorter")
    kl_nats: float = Field(0.5, gt=0, description="kl/reference per token that is far away")
    entropy_ratio: float = Field(
        0.1, gt=0, lt=1, description="entropy collapses below this share of the first step's"
    )
