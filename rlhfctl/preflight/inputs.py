"""What several checks need of a recipe, read once and only when asked for.

The first check that asks for something unreadable gets its error and reports it; the next ones are told that it
is not there, so that one missing file is one finding and not six.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rlhfctl.errors import RlhfctlError
from rlhfctl.preflight.devices import Machine, this_machine
from rlhfctl.preflight.weights import Checkpoint, read_checkpoint
from rlhfctl.recipe.sections import ModelSource, Rollout, VerifierSource
from rlhfctl.recipe.tasks import PpoRecipe

if TYPE_CHECKING:
    from rlhfctl.data.encode import DropReport, PromptRow, SftRow
    from rlhfctl.data.encode_judged import JudgedRow
    from rlhfctl.data.encode_offline import OfflineRow
    from rlhfctl.data.load import Loaded
    from rlhfctl.data.samples import Sample
    from rlhfctl.recipe.tasks import AnyRecipe
    from rlhfctl.templates.encode import ChatEncoder

T = TypeVar("T")
ROWS = 20_000  # rows of a data set that are encoded here; of a larger one evenly spaced ones
QUICK_ROWS = 500


class NotThere(Exception):
    """Something this check needs could not be read; another finding says why."""


@dataclass(slots=True)
class Encoded:
    """rows: what would be trained on or answered; every: one row in so many was looked at."""

    rows: "list[SftRow] | list[PromptRow] | list[JudgedRow] | list[OfflineRow]"
    report: "DropReport"
    every: int

    @property
    def lengths(self) -> list[int]:
        return [len(row.ids) for row in self.rows]


class Inputs:
    """All accessors raise RlhfctlError the first time and NotThere after that."""

    def __init__(self, recipe: "AnyRecipe", run_dir: Path | None, quick: bool) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.quick = quick
        # One row of the data through the templates of both sides, for each reward model: the report shows it.
        self.renders: list[dict[str, str | None]] = []
        self._values: dict[str, Any] = {}
        self._failed: dict[str, str] = {}

    def once(self, name: str, read: Callable[[], T]) -> T:
        if name in self._failed:
            raise NotThere(self._failed[name])
        if name not in self._values:
            try:
                self._values[name] = read()
            except NotThere as error:
                self._failed[name] = str(error)
                raise
            except RlhfctlError:
                self._failed[name] = f"{name} could not be read"
                raise
        return cast(T, self._values[name])

    def give_up(self, name: str, reason: str) -> None:
        """Another check already reported that this is unusable."""
        self._failed.setdefault(name, reason)

    @property
    def machine(self) -> Machine:
        return this_machine()

    @property
    def policy_path(self) -> str:
        policy = self.recipe.policy
        path = policy.path or policy.from_config
        assert path is not None  # the schema refuses a policy without either
        return path

    @property
    def tokenizer_path(self) -> str:
        return self.recipe.policy.tokenizer or self.policy_path

    def directory(self, path: str) -> Path:
        """Where a model lies on this machine; NotThere where it does not (model.py has reported it)."""
        place = locate(path)
        if place is None:
            raise NotThere(f"{path} is not on this machine")
        return place

    def config(self, path: str) -> dict[str, Any]:
        from rlhfctl.templates.files import read_json

        return self.once(
            f"config.json of {path}", lambda: read_json(self.directory(path) / "config.json") or {}
        )

    def checkpoint(self, path: str) -> Checkpoint:
        return self.once(f"weights of {path}", lambda: read_checkpoint(self.directory(path)))

    @property
    def encoder(self) -> "ChatEncoder":
        def read() -> "ChatEncoder":
            from rlhfctl.templates.encode import ChatEncoder

            self.directory(self.tokenizer_path)
            policy = self.recipe.policy
            return ChatEncoder.from_path(self.tokenizer_path, policy.chat_template, policy.template_kwargs)

        return self.once("the policy's tokenizer and template", read)

    def samples(self, split: str) -> "Loaded":
        """split: train | eval."""

        def read() -> "Loaded":
            from rlhfctl.data.load import load_samples

            sources = getattr(self.recipe.data, split)
            return load_samples(sources, self.recipe.data.max_bad_rows, judged=self.judged(split))

        return self.once(f"data.{split}", read)

    def has_samples(self, split: str) -> bool:
        return f"data.{split}" in self._values

    def encoded(self, split: str) -> Encoded:
        """The rows of a split as the trainer will see them: conversations for sft, prompts to be answered."""

        def read() -> Encoded:
            from rlhfctl.data.encode import encode_prompts
            from rlhfctl.data.prepared import preparation

            loaded = self.samples(split)
            chosen, every = spread(loaded.samples, QUICK_ROWS if self.quick else ROWS)
            if self.answered(split):
                prompts, report = encode_prompts(chosen, self.encoder, self.rollout.max_prompt_length)
                return Encoded(prompts, report, every)
            recipe = self.recipe
            assert not isinstance(recipe, PpoRecipe)  # its prompts are answered
            work = preparation(recipe, getattr(recipe.data, split), self.encoder)
            same = work.judged == self.judged(split)
            held = work.held() if same else None
            if held is not None:
                return Encoded(held.rows, held.report, 1)
            rows, report = work.encode(chosen)
            if same and every == 1:
                work.keep(loaded, rows, report)  # where the trainer finds them
            return Encoded(rows, report, every)

        return self.once(f"the encoded rows of data.{split}", read)

    def judged(self, split: str) -> bool:
        """Whether this split's rows are read with their judgement."""
        recipe = self.recipe
        return recipe.task == "rm" or (recipe.task == "oreo" and split == "train" and recipe.collect is None)

    def answered(self, split: str) -> bool:
        """Whether the policy answers this split's prompts (else it is trained or measured on its responses)."""
        recipe = self.recipe
        if recipe.task == "oreo" and split == "train":
            return recipe.collect is not None
        return isinstance(recipe, PpoRecipe) or (split == "eval" and recipe.reward is not None)

    @property
    def rollout(self) -> Rollout:
        """How prompts are answered, in training or in evaluation."""
        recipe = self.recipe
        rollout = recipe.evaluation_rollout() if recipe.task in ("sft", "oreo") else recipe.rollout
        assert rollout is not None  # rm answers nothing
        return rollout

    @property
    def reward_models(self) -> list[ModelSource]:
        sources = self.recipe.reward.sources if self.recipe.reward is not None else []
        return [source for source in sources if isinstance(source, ModelSource)]

    @property
    def started_from(self) -> dict[str, str]:
        """By recipe key the checkpoints of their own that the models beside the policy start from and are trained."""
        recipe, found = self.recipe, {}
        if isinstance(recipe, PpoRecipe) and recipe.implicit_prm is not None and recipe.implicit_prm.path:
            found["implicit_prm.path"] = recipe.implicit_prm.path
        values = recipe.values_of()
        if values is not None and not values.shared_trunk and values.init != "policy":
            rewards = [source.path for source in self.reward_models]
            for path in rewards[:1] if values.init == "reward_model" else [values.init]:
                found["value_model.init"] = path
        return {key: path for key, path in found.items() if locate(path) is not None}

    @property
    def verifiers(self) -> list[VerifierSource]:
        sources = self.recipe.reward.sources if self.recipe.reward is not None else []
        return [source for source in sources if isinstance(source, VerifierSource)]


def spread(samples: "list[Sample]", most: int) -> "tuple[list[Sample], int]":
    """At most `most` samples, evenly spaced, and one in how many they are."""
    every = max(1, -(-len(samples) // most))
    return samples[::every], every


def locate(path: str) -> Path | None:
    """A model directory: itself, or a hub id's snapshot in the local cache; None where it is neither."""
    place = Path(path)
    if place.is_dir():
        return place
    if not looks_like_hub_id(path):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except Exception:  # the library has a class for each way of not being in the cache
        return None


def looks_like_hub_id(path: str) -> bool:
    """ORGANISATION/NAME, and nothing of that name here."""
    parts = path.split("/")
    return (
        len(parts) == 2
        and all(part and not part.startswith(".") for part in parts)
        and not Path(path).exists()
    )
