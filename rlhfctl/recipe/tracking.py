"""The tracking section: where a run's metrics are written beside metrics.jsonl."""

import os
from typing import Literal

from pydantic import Field

from rlhfctl.recipe.sections import Section


class Wandb(Section):
    project: str = Field(description="W&B project that the run belongs to", min_length=1)
    entity: str | None = Field(
        None, description="user or team that owns the project; null: the account's own"
    )
    group: str | None = Field(None, description="runs that are shown together")
    tags: list[str] = Field(default_factory=list, description="words to find the run by")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: files in RUN_DIR/wandb and no network; `wandb sync` sends them later"
    )


class Tracking(Section):
    tensorboard: bool = Field(False, description="write event files for TensorBoard to RUN_DIR/tensorboard")
    sparkline: bool = Field(False, description="the reward's course in the live line of a terminal")
    wandb: Wandb | None = Field(None, description="write to Weights & Biases")


def wandb_mode(wandb: Wandb) -> str:
    """online | offline | disabled. WANDB_MODE says what this one launch may do; it never turns offline to online."""
    asked = os.environ.get("WANDB_MODE", "")
    return asked if asked in ("offline", "disabled") else wandb.mode
