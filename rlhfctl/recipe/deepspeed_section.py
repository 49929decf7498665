"""The deepspeed section of a recipe."""

from typing import Literal

from pydantic import Field

from rlhfctl.recipe.base import NonNegative, Positive, Section


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="what is kept in parts: 1 optimizer state, 2 gradients too, 3 parameters too; 0: nothing",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="kept and stepped in CPU memory: the optimizer; all: parameters too (ZeRO-3)"
    )
    bucket_elements: Positive = Field(
        50_000_000, description="elements that one collective reduces or gathers at most"
    )
    persist_below: NonNegative = Field(
        100_000, description="ZeRO-3: parameters of at most so many elements stay whole on every rank"
    )
