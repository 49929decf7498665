"""Samples of a policy with their verdicts, made inside a run: split over the ranks, and in pieces that survive a stop.

What request i is answered with is a function of the seed, the step and i alone, so pieces made before a stop and after
it are those of a run that was never stopped.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhfctl.data.encode import DropReport, PromptRow, encode_prompts
from rlhfctl.data.load import load_samples
from rlhfctl.errors import Interrupted, RunFailed
from rlhfctl.evaluation.answers import Answer, Judge
from rlhfctl.evaluation.run import Answerer
from rlhfctl.evaluation.settings import Settings
from rlhfctl.evaluation.subject import Subject
from rlhfctl.recipe.sections import DataSource, Policy, Rollout
from rlhfctl.recipe.tasks import OreoRecipe, ReftRecipe
from rlhfctl.rollout.types import Request
from rlhfctl.run_dir import json_lines, write_text
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.distributed import any_rank, barrier, gather_lists

PIECE = 2048  # requests that are sampled, judged and written at a time


def answerer_of(ctx: RunContext, recipe: OreoRecipe, policy: Policy) -> Answerer:
    """Samples as the recipe's `rollout` says, and steps as its step_delimiters say."""
    assert recipe.reward is not None  # the recipe asks for it
    subject = Subject(
        policy.model_copy(update={"lora": None}), [], recipe.reward, recipe.evaluation_rollout(),
        recipe.data.max_bad_rows,
    )  # fmt: skip
    settings = Settings(
        str(policy.path), search="sample", seed=recipe.seed, delimiters=recipe.algorithm.step_delimiters
    )
    return Answerer(subject, settings, ctx.say)


def prompts_of(
    recipe: OreoRecipe | ReftRecipe, sources: list[DataSource], answerer: Answerer
) -> tuple[list[PromptRow], DropReport]:
    """The sources' prompts that fit the recipe's limit and the model's context."""
    samples = load_samples(sources, recipe.data.max_bad_rows).samples
    limits = ((recipe.rollout or Rollout()).max_prompt_length, answerer.longest_prompt)
    longest = min((limit for limit in limits if limit is not None), default=None)
    return encode_prompts(samples, answerer.encoder, longest)


def sampled(
    ctx: RunContext,
    answerer: Answerer,
    judge: Judge,
    asked: Sequence[PromptRow],
    step: int,
    directory: Path,
    what: str,
) -> list[Answer]:
    """One answer to each of `asked`. step: of the random numbers; directory: for the pieces, gone at the end of the
    phase by `forget`."""
    pieces = range(0, len(asked), PIECE)
    answers: list[Answer] = []
    allowed = getattr(getattr(ctx.recipe, "reward", None), "max_failures", 0)
    for number, start in enumerate(pieces):
        file = directory / f"{number:04d}.jsonl"
        kept = file.is_file()
        if kept:
            lines = json_lines(file.read_text())
        else:
            mine = range(start + ctx.rank, min(start + PIECE, len(asked)), ctx.world)
            requests = [Request(index, asked[index].ids) for index in mine]
            found = judge(
                [asked[index] for index in mine],
                answerer.engine.generate(requests, answerer.sampling(False, step)),
            )
            made = gather_lists(
                [
                    (index, json.dumps({**each.record(), "ids": each.ids}))
                    for index, each in zip(mine, found, strict=True)
                ]
            )
            lines = [line for _, line in sorted(made)]
        answers += [Answer(**json.loads(line)) for line in lines]
        failed = [each.failure for each in answers if each.correct is None or each.reward is None]
        if len(failed) > allowed:  # the piece is not kept: a resume judges its samples again
            raise RunFailed(
                f"{len(failed)} samples could not be judged, {allowed} allowed (reward.max_failures); "
                f"first: {failed[0]}"
            )
        if not kept:
            if ctx.rank == 0:
                directory.mkdir(parents=True, exist_ok=True)
                write_text(file, "".join(f"{line}\n" for line in lines))
            barrier()
            ctx.say(f"{what}: {min(start + PIECE, len(asked))} of {len(asked)} samples")
        signum = any_rank(ctx.stop_signal() or 0)
        if signum:
            raise Interrupted(signum, f"interrupted while it samples ({what}); continue with --resume")
    return answers


def forget(ctx: RunContext, directory: Path) -> None:
    """What came of the pieces is kept elsewhere now."""
    if ctx.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    barrier()
