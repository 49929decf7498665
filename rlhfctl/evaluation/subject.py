"""What is evaluated: a model directory, or a run with the settings of its recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from rlhfctl.errors import Refused, UsageError
from rlhfctl.evaluation.settings import Settings
from rlhfctl.recipe.load import read_resolved
from rlhfctl.recipe.rollout_server import RolloutServer
from rlhfctl.recipe.sections import DataSource, Policy, Reward, Rollout, VerifierSource
from rlhfctl.run_dir import RunDir


@dataclass(slots=True)
class Subject:
    """policy: what is loaded. data: the prompts. trained_on: what it, and what it started from, were trained on, as far
    as run directories tell. run: the run directory, None for a model directory."""

    policy: Policy
    data: list[DataSource]
    reward: Reward
    rollout: Rollout
    max_bad_rows: int
    trained_on: list[DataSource] = field(default_factory=list)
    run: Path | None = None


def open_subject(settings: Settings) -> Subject:
    """Raises UsageError where there is nothing to evaluate or nothing to evaluate on, Refused for an unfinished run."""
    place = Path(settings.source)
    run = RunDir(place)
    given = [DataSource(path=settings.data)] if settings.data is not None else []
    if run.recipe.is_file():
        return _of_run(run, settings, given)
    if not (place / "config.json").is_file() and not (place / "adapter_config.json").is_file():
        what = "holds no config.json and no recipe.yaml" if place.is_dir() else "is no directory"
        raise UsageError(f"{settings.source} {what}: give a model directory or a run directory")
    if not given:
        raise UsageError(f"{settings.source} is a model: give the prompts with --data FILE")
    if settings.verifier is None:
        raise UsageError(
            f"{settings.source} is a model: say what is right with --verifier {' | '.join(verifiers())}"
        )
    return Subject(
        Policy(path=settings.source),
        given,
        Reward(sources=[verifier_source(settings.verifier)]),
        _rollout(Rollout(), settings),
        0,
        lineage(settings.source),
    )


def _of_run(run: RunDir, settings: Settings, given: list[DataSource]) -> Subject:
    recipe = read_resolved(run.recipe)
    if recipe.task == "rm":
        raise Refused(
            f"{run.path} is a run of rm: a reward model writes no answers; rank with --reward-model"
        )
    if not (run.final / "config.json").is_file() and not (run.final / "adapter_config.json").is_file():
        raise Refused(f"{run.path} has no final/ model: the run is not finished; continue it with --resume")
    if not given and not recipe.data.eval:
        raise UsageError(f"the recipe of {run.path} has no data.eval: give the prompts with --data FILE")
    if settings.verifier is not None:
        reward = Reward(sources=[verifier_source(settings.verifier)])
    elif recipe.reward is None:
        raise UsageError(f"the recipe of {run.path} has no reward: say what is right with --verifier NAME")
    else:
        reward = judging(recipe.reward, run)
    return Subject(
        recipe.policy.model_copy(
            update={"path": str(run.final), "from_config": None, "tokenizer": None, "chat_template": None}
            | {"lora": None, "quantization": "none"}  # merged weights are dense, an adapter tells of its base
        ),
        given or recipe.data.eval,
        reward,
        _rollout(recipe.rollout or Rollout(), settings),
        recipe.data.max_bad_rows,
        lineage(str(run.final)),
        run.path,
    )


def judging(reward: Reward, run: RunDir) -> Reward:
    """The sources that can say whether an answer is correct; a model's score says nothing of that."""
    kept = [source for source in reward.sources if source.kind in ("verifier", "python")]
    if not kept:
        raise UsageError(
            f"no reward source of {run.path} says whether an answer is correct: give --verifier NAME"
        )
    return reward.model_copy(update={"sources": kept})


def verifiers() -> tuple[str, ...]:
    return get_args(VerifierSource.model_fields["name"].annotation)


def verifier_source(name: str) -> VerifierSource:
    if name not in verifiers():
        raise UsageError(f"--verifier {name}: give {' or '.join(verifiers())}")
    return VerifierSource.model_validate({"kind": "verifier", "name": name})


def _rollout(rollout: Rollout, settings: Settings) -> Rollout:
    """The recipe's, with what the options say instead. Sampling is at temperature 1 unless they say otherwise: a
    recipe's temperature is that of its exploration."""
    changed: dict[str, object] = {"temperature": settings.temperature or 1.0, "n": settings.samples}
    changed |= {"top_p": 1.0, "engine": settings.engine, "server": RolloutServer()}
    if settings.max_new_tokens is not None:
        changed["max_new_tokens"] = settings.max_new_tokens
    return rollout.model_copy(update=changed)


def lineage(model: str) -> list[DataSource]:
    """Training data of the run that wrote a model and of the runs that it started from, as long as recipes tell."""
    found: list[DataSource] = []
    seen: set[Path] = set()
    place: str | None = model
    while place is not None:
        run = run_of(Path(place).absolute())
        if run is None or run.path in seen:
            break
        seen.add(run.path)
        recipe = read_resolved(run.recipe)
        found += recipe.data.train
        place = recipe.policy.path
    return found


def run_of(model: Path) -> RunDir | None:
    """The run whose final/, warmup/, rounds/N/policy or checkpoints/step_N/policy the directory is."""
    up = 0 if model.name in ("final", "warmup") else 2
    if up and (model.name != "policy" or model.parts[-3:-2] not in (("rounds",), ("checkpoints",))):
        return None
    run = RunDir(model.parents[up])
    return run if run.recipe.is_file() else None
