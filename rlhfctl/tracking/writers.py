"""TensorBoard and Weights & Biases beside metrics.jsonl: the same names, the same steps, on rank 0 alone.

1. A writer is opened by the first record: its step is known then, and with it what a resume takes back. TensorBoard
   hides earlier events from that step on; W&B keeps those that it has, which equal the ones that come again.
2. The W&B run id is made before the first attempt and kept in tracking.json, so every attempt is one W&B run.
3. A writer that breaks is told once and left out: metrics.jsonl is the record, and training goes on.
4. W&B gets metrics and the recipe. No code, no command line, no console output, no environment: those may hold secrets.
"""

import json
import os
import re
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from rlhfctl.recipe.tasks import AnyRecipe
from rlhfctl.recipe.tracking import Wandb, wandb_mode
from rlhfctl.run_dir import RunDir, write_text

CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # of https://user:password@host
SECONDS_TO_CONNECT = 30.0
SECONDS_TO_FINISH = 60


class Writer(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Writers:
    """What the recipe's `tracking` asks for; nothing where it asks for nothing."""

    def __init__(self, recipe: AnyRecipe, run: RunDir, say: Callable[[str], None]) -> None:
        self.recipe, self.run, self.say = recipe, run, say
        self.open: dict[str, Writer] | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.open is None:
            self.open = {}
            tracking = self.recipe.tracking
            if tracking.tensorboard:
                self._open("tensorboard", lambda: TensorBoard(self.run, step))
            if tracking.wandb is not None and wandb_mode(tracking.wandb) != "disabled":
                wandb = tracking.wandb
                self._open("wandb", lambda: WeightsAndBiases(self.recipe, wandb, self.run))
        for name, writer in list(self.open.items()):
            self._try(name, lambda writer=writer: writer.log(step, metrics))  # type: ignore[misc]

    def close(self, exit_code: int) -> None:
        for name, writer in list((self.open or {}).items()):
            self._try(name, lambda writer=writer: writer.close(exit_code))  # type: ignore[misc]
        self.open = {}

    def _open(self, name: str, make: Callable[[], Writer]) -> None:
        def keep() -> None:
            assert self.open is not None
            self.open[name] = make()

        self._try(name, keep)

    def _try(self, name: str, act: Callable[[], None]) -> None:
        """A tracker's failure is never the run's, whatever its library raises."""
        try:
            act()
        except Exception as error:
            (self.open or {}).pop(name, None)
            cause = str(error).strip().splitlines() or [""]
            self.say(
                f"tracking.{name} stopped: {type(error).__name__}: {cause[0]}; metrics.jsonl is complete, and the run "
                "goes on"
            )


class TensorBoard:
    """Event files in RUN_DIR/tensorboard; each attempt its own file, which takes over from its first step on."""

    def __init__(self, run: RunDir, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=first)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self, exit_code: int) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Files in RUN_DIR/wandb, and a run of the project where it is online."""

    def __init__(self, recipe: AnyRecipe, wanted: Wandb, run: RunDir) -> None:
        # Its own telemetry leaves the machine in offline mode too (wandb 0.31), and is read at import.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            init_timeout=SECONDS_TO_CONNECT,
            finish_timeout=SECONDS_TO_FINISH,
        )
        self.run = wandb.init(
            dir=run.path,
            mode="offline" if wandb_mode(wanted) == "offline" else "online",
            id=run_id(run),
            resume="allow",
            project=wanted.project,
            entity=wanted.entity,
            group=wanted.group,
            tags=wanted.tags,
            name=f"{recipe.name}-{run.path.absolute().name}",
            config=without_credentials(recipe.model_dump(mode="json")),
            settings=settings,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


def run_id(run: RunDir) -> str:
    """The W&B id of this run directory: read from tracking.json, or made and written there before it is used."""
    path = run.path / "tracking.json"
    try:
        return str(json.loads(path.read_text())["wandb"]["id"])
    except FileNotFoundError:
        made = secrets.token_hex(6)
        write_text(path, json.dumps({"schema": 1, "wandb": {"id": made}}) + "\n")
        return made


def without_credentials(value: Any) -> Any:
    """The recipe with user:password taken out of its URLs."""
    if isinstance(value, str):
        return CREDENTIALS.sub("...", value)
    if isinstance(value, dict):
        return {key: without_credentials(item) for key, item in value.items()}
    return [without_credentials(item) for item in value] if isinstance(value, list) else value
