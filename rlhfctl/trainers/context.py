"""What a trainer is handed by the worker."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhfctl.recipe.tasks import AnyRecipe
from rlhfctl.run_dir import RunDir
from rlhfctl.tracking.writers import Writers


@dataclass(frozen=True, slots=True)
class Phase:
    """One of several phases of a run. first: the run's step that it starts at; model: where the phase's model goes,
    None: final/."""

    number: int
    first: int
    model: Path | None


@dataclass(slots=True)
class RunContext:
    """One rank's view of the run.

    stop_signal: returns the number of the signal that asked the run to stop, or None; trainers ask it at each step
    boundary through `trainers.checkpoint`. say: prints one line on stderr (rank 0 only) and to the rank's log. phase:
    None in a run of one. writers: on rank 0, what gets the metrics beside metrics.jsonl.
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
    phase: Phase | None = None
    writers: Writers | None = None

    @property
    def first(self) -> int:
        """The step that this phase starts at; 0 in a run of one phase."""
        return self.phase.first if self.phase else 0
