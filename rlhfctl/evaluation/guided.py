"""Answers chosen by a value or a reward model: best of n, and beam search; and what the values are worth."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhfctl.errors import Refused
from rlhfctl.evaluation import results
from rlhfctl.evaluation.answers import Answer, Judge
from rlhfctl.evaluation.settings import Settings
from rlhfctl.models.load import resolve_dtype
from rlhfctl.models.value_model import ValueFunction, load_value_model, refuse_other_vocabulary
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.rewards.sample import reward_sample
from rlhfctl.rollout.types import Rollout
from rlhfctl.search.beam import Beam, Candidate, Tree, beam_search
from rlhfctl.search.best_of_n import best_of

if TYPE_CHECKING:
    from rlhfctl.evaluation.run import Answerer, Row, State
    from rlhfctl.rewards.model import ModelReward

TOKENS_PER_FORWARD = 16384


def load_guide(settings: Settings, answerer: "Answerer") -> "ModelReward | ValueFunction | None":
    """What ranks; loaded before anything is sampled, which a directory that cannot be read would waste."""
    if settings.reward_model is not None:
        from rlhfctl.rewards.model import ModelReward

        return ModelReward(ModelSource(kind="model", path=settings.reward_model), answerer.encoder)
    if settings.value_model is None:
        return None
    model = load_value_model(settings.value_model, resolve_dtype("auto", answerer.device), answerer.device)
    refuse_other_vocabulary(settings.value_model, answerer.tokenizer)
    return model


def choose(
    guide: "ModelReward | ValueFunction",
    settings: Settings,
    answerer: "Answerer",
    judge: Judge,
    rows: list["Row"],
    say: Callable[[str], None],
) -> None:
    """Fills the rows' states, and `chosen` where the search chooses."""
    if not isinstance(guide, ValueFunction):
        _best_of_n(rows, _reward_scores(guide, rows, say), settings.alpha or 0.0)
        return
    alpha = settings.alpha if settings.alpha is not None else float(guide.facts.get("alpha", 0.0))
    read = [(row, answer) for row in rows for answer in (row.samples or [row.greedy])]
    values = _read_states(guide, answerer, read)
    if settings.search == "best-of-n":
        final = iter(group[-1] for group in values)
        _best_of_n(rows, [[next(final) for _ in row.samples] for row in rows], alpha)
    elif settings.search == "beam":
        say(f"{len(rows)} prompts, beams of {settings.samples}, score V + {alpha:g} log pi")
        _beams(settings, answerer, judge, rows, guide, alpha)


def _read_states(
    model: ValueFunction, answerer: "Answerer", read: Sequence[tuple["Row", Answer]]
) -> list[list[float]]:
    """V at the end of each step of the answers and at their last trained state; noted in the rows' states."""
    ids, places = [], []
    for row, answer in read:
        prompt = row.prompt.ids
        response = answer.ids if answer.truncated else answer.ids[:-1]
        ends = answerer.delimiters.ends(response)
        if not ends or ends[-1] != len(response) - 1:
            ends.append(len(response) - 1)
        ids.append(prompt + response)
        places.append([len(prompt) + end for end in ends])
    values = model.at(ids, places, TOKENS_PER_FORWARD, [len(row.prompt.ids) for row, _ in read])
    for (row, answer), found in zip(read, values, strict=True):
        row.states += _states(answer, found, model.facts.get("link") == "logistic")
    return values


def _states(answer: Answer, values: Sequence[float], logistic: bool) -> list["State"]:
    from rlhfctl.evaluation.run import State

    if answer.correct is None:
        return []
    steps = answer.steps_right
    known = steps if steps is not None and len(steps) == len(values) else [None] * len(values)
    return [
        State(
            value,
            0.5 * (1 + math.tanh(value / 2)) if logistic else min(1.0, max(0.0, value)),
            answer.correct,
            right,
        )
        for value, right in zip(values, known, strict=True)
    ]


def _reward_scores(
    source: "ModelReward", rows: Sequence["Row"], say: Callable[[str], None]
) -> list[list[float]]:
    """A sample without a score is taken only where no other of its prompt has one; that is told."""
    samples = [reward_sample(row.prompt.sample, answer.text) for row in rows for answer in row.samples]
    outcomes = source.score(samples)
    failed = [outcome.error for outcome in outcomes if outcome.score is None]
    if len(failed) == len(outcomes):
        raise Refused(f"the reward model scored none of the samples: {failed[0]}")
    if failed:
        say(
            f"warning: the reward model scored {len(outcomes) - len(failed)} of {len(outcomes)} samples, and only they "
            f"compete; first failure: {failed[0]}"
        )
    scores = iter(-math.inf if outcome.score is None else outcome.score for outcome in outcomes)
    return [[next(scores) for _ in row.samples] for row in rows]


def _best_of_n(rows: Sequence["Row"], values: Sequence[Sequence[float]], alpha: float) -> None:
    for row, found in zip(rows, values, strict=True):
        for answer, value in zip(row.samples, found, strict=True):
            answer.score = value + alpha * answer.logprob if value > -math.inf else None
        row.chosen = row.samples[best_of(found, [answer.logprob for answer in row.samples], alpha)]
        row.search_tokens = sum(answer.tokens for answer in row.samples)
        row.search_steps = sum(answer.steps for answer in row.samples)


def _beams(
    settings: Settings,
    answerer: "Answerer",
    judge: Judge,
    rows: list["Row"],
    model: ValueFunction,
    alpha: float,
) -> None:
    prompts = [row.prompt.ids for row in rows]
    trees = beam_search(
        answerer.engine,
        prompts,
        value_of(model, prompts, answerer.encoder.stop_ids),
        Beam(settings.samples, settings.beam_steps, alpha),
        answerer.sampling(False),
        answerer.delimiters,
    )
    answers = judge([row.prompt for row in rows], [rollout_of(tree, prompts) for tree in trees])
    for row, answer, tree in zip(rows, answers, trees, strict=True):
        answer.logprob, answer.score = tree.answer.logprob, tree.answer.score
        row.chosen, row.search_tokens, row.search_steps = answer, tree.tokens, len(tree.candidates)
    if settings.trees is not None:
        results.write_lines(
            settings.trees, [_tree_record(r, t, answerer) for r, t in zip(rows, trees, strict=True)]
        )


def value_of(
    model: ValueFunction, prompts: Sequence[list[int]], stop_ids: Sequence[int]
) -> Callable[[list[Candidate]], list[float]]:
    """V of candidates, read at the last token of their state."""

    def value(candidates: list[Candidate]) -> list[float]:
        rows = [prompts[each.prompt] + each.state(stop_ids) for each in candidates]
        lengths = [len(prompts[each.prompt]) for each in candidates]
        found = model.at(rows, [[len(row) - 1] for row in rows], TOKENS_PER_FORWARD, lengths)
        return [values[0] for values in found]

    return value


def rollout_of(tree: Tree, prompts: Sequence[list[int]]) -> Rollout:
    """The chosen answer, without its log-probabilities."""
    answer = tree.answer
    finish = "stop" if answer.finish == "stop" else "length"
    return Rollout(answer.prompt, prompts[answer.prompt], answer.ids, torch.zeros(1), finish)  # type: ignore[arg-type]


def _tree_record(row: "Row", tree: Tree, answerer: "Answerer") -> dict[str, Any]:
    nodes = [
        {
            "parent": each.parent,
            "depth": each.depth,
            "text": answerer.encoder.decode_response(each.ids[each.step :]),
            "value": each.value,
            "logprob": each.logprob,
            "score": each.score,
            "finish": each.finish,
            "kept": each.kept,
        }
        for each in tree.candidates
    ]
    return {"id": row.prompt.sample.id, "chosen": tree.chosen, "nodes": nodes}
