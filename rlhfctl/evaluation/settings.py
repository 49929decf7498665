"""What one evaluation is asked to do, checked before anything heavy is loaded."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from rlhfctl.errors import UsageError
from rlhfctl.recipe.base import COLDEST
from rlhfctl.recipe.sections import Rollout

ENGINES = get_args(Rollout.model_fields["engine"].annotation)
SEARCHES = ("greedy", "sample", "best-of-n", "beam")


@dataclass(slots=True)
class Settings:
    """As the options of `rlhfctl eval`, None: from the run's recipe, or the default beside the field.

    n: samples per prompt, of a beam search its width. alpha: factor of the cumulative log-probability in a
    candidate's score; None: what the value model was fitted with, else 0.
    """

    source: str
    data: str | None = None
    verifier: str | None = None
    search: str = "greedy"
    n: int | None = None  # sample and best-of-n: 8, beam: 4
    value_model: str | None = None
    reward_model: str | None = None
    alpha: float | None = None
    delimiters: list[str] = field(default_factory=list)  # one newline
    max_steps: int | None = None  # 20
    temperature: float | None = None  # 1.0
    max_new_tokens: int | None = None  # 256
    seed: int = 0
    limit: int | None = None
    engine: str = "hf"
    out: Path | None = None
    compare: Path | None = None
    trajectories: Path | None = None
    balance: int | None = None
    trees: Path | None = None

    def take_own_value_model(self) -> None:
        """A search that nothing else guides is guided by the run's own value_model/, where it has one."""
        own = Path(self.source) / "value_model"
        if self.search in ("beam", "best-of-n") and not (self.value_model or self.reward_model):
            self.value_model = str(own) if (own / "config.json").is_file() else None

    def check(self) -> None:
        """Raises UsageError where options contradict each other or would be ignored."""
        if self.search not in SEARCHES:
            raise UsageError(f"--search {self.search}: give {', '.join(SEARCHES)}")
        if self.engine not in ENGINES:
            raise UsageError(f"--engine {self.engine}: give {' or '.join(ENGINES)}")
        if self.search == "beam" and self.value_model is None:
            raise UsageError(
                f"--search beam is guided by a value, and {self.source} has no value_model/: give --value-model DIR"
            )
        if self.search == "best-of-n" and not (self.value_model or self.reward_model):
            raise UsageError("--search best-of-n ranks samples: give --value-model DIR or --reward-model DIR")
        guided = self.search in ("best-of-n", "beam")
        for given, wanted, why in (
            (self.value_model, self.search != "greedy", "--value-model is for --search sample, best-of-n or beam"),
            (self.reward_model, self.search == "best-of-n", "--reward-model ranks the samples of --search best-of-n"),
            (self.alpha, guided, "--alpha weighs log-probabilities in --search best-of-n or beam"),
            (self.trees, self.search == "beam", "--save-trees keeps the candidates of --search beam"),
            (self.max_steps, self.search == "beam", "--max-steps bounds the candidates of --search beam"),
            (self.n, self.search != "greedy", "-n is for --search sample, best-of-n or beam"),
            (self.temperature, self.search != "greedy", "--temperature is for --search sample, best-of-n or beam"),
            (self.balance, self.trajectories is not None, "--balance is about the rows of --save-trajectories"),
        ):  # fmt: skip
            if given is not None and not wanted:
                raise UsageError(why)
        if self.value_model and self.reward_model:
            raise UsageError("--value-model and --reward-model both rank the samples: give one of them")
        if self.trajectories is not None and self.search not in ("sample", "best-of-n"):
            raise UsageError("--save-trajectories writes the samples of --search sample (or best-of-n)")
        if self.temperature is not None and not COLDEST <= self.temperature < math.inf:
            raise UsageError(
                f"--temperature {self.temperature:g}: give a finite number of {COLDEST:g} or more; --search greedy is "
                "what 0 would mean"
            )
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise UsageError(f"--alpha {self.alpha:g}: give a finite number")
        if any(not delimiter for delimiter in self.delimiters):
            raise UsageError("--delimiter is empty: give the text that ends a step, e.g. '\\n'")

    @property
    def samples(self) -> int:
        return self.n if self.n is not None else 4 if self.search == "beam" else 8

    @property
    def beam_steps(self) -> int:
        return self.max_steps if self.max_steps is not None else 20

    @property
    def ends(self) -> tuple[str, ...]:
        r"""The texts that end a step. A shell passes \n as two characters: they are read as the newline they mean."""
        given = [delimiter.replace("\\n", "\n").replace("\\t", "\t") for delimiter in self.delimiters]
        return tuple(given) or ("\n",)
