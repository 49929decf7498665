"""What a trainer is handed by the worker."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhfctl.recipe.tasks import AnyRecipe
from rlhfctl.run_dir import RunDir


@dataclass(slots=True)
class RunContext:
    """One rank's view of the run.

    stop_signal: returns the number of the signal that asked the run to stop, or None; trainers ask it at each step
    boundary through `trainers.checkpoint`. say: prints one line on stderr (rank 0 only) and to the rank's log.
    """

    recipe: AnyRecipe
    run: RunDir
    rank: int
    world: int
    device: torch.device
    resume: bool
    attempt: int
    stop_signal: Callable[[], int | None]
    say: Callable[[str], None]
