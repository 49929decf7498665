"""Beam search over reasoning steps, guided by a value of the state after each step.

    live = {prompt}
    repeat: sample B continuations of each live state, up to and including the next delimiter
            score = V(state after the step) + alpha * log pi(response so far)
            what ended by itself is finished and competes no more; the best B of the rest live on
    until nothing lives or max_steps is reached; the answer is the finished candidate with the highest score

After Wang et al. 2024 (OREO, arXiv 2412.16145, section 4.4), with these choices:
1. Equal candidates are kept apart. Steps are short and discrete: without duplicates one or two states stay, and the
   right one gets B samples where it would have had most of B * B.
2. V is read at the delimiter token, for a finished candidate at the last token before the stop token: V after the stop
   token is trained by nothing.
3. alpha weighs the cumulative log-probability at the sampling temperature; 0 is V alone, as in the paper.
4. A candidate that was cut by the token limit is finished, and is chosen only where nothing ended by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhfctl.errors import Refused
from rlhfctl.rollout.delimiters import Delimiters
from rlhfctl.rollout.engine import Engine
from rlhfctl.rollout.types import Request, Rollout, Sampling


@dataclass(slots=True)
class Candidate:
    """A response so far. parent: place of the candidate it continues in its tree's list, None: the prompt.

    ids: all response tokens, the stop token included. step: place of the first token of its last step. value: V;
    score: value + alpha * logprob. kept: it was continued.
    """

    prompt: int
    ids: list[int]
    logprob: float
    finish: Literal["stop", "length", "delimiter"]
    depth: int
    parent: int | None
    step: int
    value: float = 0.0
    score: float = 0.0
    kept: bool = False

    def state(self, stop_ids: Sequence[int]) -> list[int]:
        """The tokens of the state that V reads: without the stop token."""
        return self.ids[:-1] if self.finish == "stop" and self.ids[-1] in stop_ids else self.ids


# V of each candidate's state.
Value = Callable[[list[Candidate]], list[float]]


@dataclass(slots=True)
class Tree:
    """All candidates of one prompt in the order in which they were made, and the place of the chosen one."""

    candidates: list[Candidate]
    chosen: int = -1

    @property
    def answer(self) -> Candidate:
        return self.candidates[self.chosen]

    @property
    def tokens(self) -> int:
        """Everything that was sampled for it."""
        return sum(len(candidate.ids) - candidate.step for candidate in self.candidates)


@dataclass(frozen=True, slots=True)
class Beam:
    width: int
    max_steps: int
    alpha: float


def beam_search(
    engine: Engine,
    prompts: Sequence[list[int]],
    value: Value,
    beam: Beam,
    sampling: Sampling,
    delimiters: Delimiters,
) -> list[Tree]:
    """One tree a prompt; all prompts advance together. sampling: of whole responses, its max_new_tokens bounds each.

    Raises Refused where no step of any candidate ends in a delimiter.
    """
    trees = [Tree([]) for _ in prompts]
    live: list[list[int | None]] = [[None] for _ in prompts]
    for depth in range(beam.max_steps):
        if not any(live):
            break
        made = _continue(engine, prompts, trees, live, beam, sampling, delimiters, depth)
        for candidate, found in zip(made, value(made), strict=True):
            candidate.value = found
            candidate.score = found + beam.alpha * candidate.logprob
        if depth == 0 and made and not any(candidate.finish == "delimiter" for candidate in made):
            shown = ", ".join(map(repr, delimiters.texts))
            raise Refused(
                f"none of {len(made)} answers holds the delimiter {shown}: there are no steps to search over; "
                "give what ends a step with --delimiter"
            )
        fresh: list[list[int]] = [[] for _ in prompts]
        for candidate in made:
            tree = trees[candidate.prompt]
            if candidate.finish == "delimiter":
                fresh[candidate.prompt].append(len(tree.candidates))
            tree.candidates.append(candidate)
        for tree, places, row in zip(trees, fresh, range(len(prompts)), strict=True):
            best = sorted(places, key=lambda place: -tree.candidates[place].score)[: beam.width]
            live[row] = list(best)
            for place in best if depth + 1 < beam.max_steps else []:
                tree.candidates[place].kept = True
    for tree in trees:
        tree.chosen = _best(tree.candidates)
    return trees


def _continue(
    engine: Engine,
    prompts: Sequence[list[int]],
    trees: Sequence[Tree],
    live: Sequence[Sequence[int | None]],
    beam: Beam,
    sampling: Sampling,
    delimiters: Delimiters,
    depth: int,
) -> list[Candidate]:
    """B continuations of every live state, one step long."""
    requests: list[Request] = []
    origins: list[tuple[int, int | None, list[int], float]] = []
    for row, states in enumerate(live):
        for slot, place in enumerate(states):
            parent = None if place is None else trees[row].candidates[place]
            ids, logprob = ([], 0.0) if parent is None else (parent.ids, parent.logprob)
            for k in range(beam.width):
                index = (row * beam.width + slot) * beam.width + k
                requests.append(Request(index, prompts[row] + ids, sampling.max_new_tokens - len(ids)))
                origins.append((row, place, ids, logprob))
    room = sampling.max_new_tokens - min(len(ids) for _, _, ids, _ in origins)
    step = replace(sampling, max_new_tokens=room, delimiters=delimiters, step=sampling.step + 1 + depth)
    rollouts = engine.generate(requests, step)
    return [
        _grown(rollout, origin, sampling.max_new_tokens, depth, delimiters)
        for rollout, origin in zip(rollouts, origins, strict=True)
    ]


def _grown(
    rollout: Rollout,
    origin: tuple[int, int | None, list[int], float],
    longest: int,
    depth: int,
    delimiters: Delimiters,
) -> Candidate:
    """Cut where the whole response would be longer than it may: states of one depth have different lengths."""
    row, parent, ids, logprob = origin
    # An engine that knows nothing of delimiters has gone on behind the first one.
    end = next(iter(delimiters.ends(rollout.response_ids)), None)
    size = len(rollout.response_ids) if end is None else end + 1
    taken = min(size, longest - len(ids))
    finish = rollout.finish if end is None else "delimiter"
    if taken < size or (finish == "delimiter" and len(ids) + taken >= longest):
        finish = "length"
    return Candidate(
        prompt=row,
        ids=ids + rollout.response_ids[:taken],
        logprob=logprob + float(rollout.logprobs[:taken].sum()),
        finish=finish,
        depth=depth,
        parent=parent,
        step=len(ids),
    )


def _best(candidates: Sequence[Candidate]) -> int:
    """What ended by itself before what was cut, that before what is not finished; then the score, then the first."""
    order = {"stop": 0, "length": 1, "delimiter": 2}
    deepest = max(candidate.depth for candidate in candidates)

    def key(place: int) -> tuple[int, int, float]:
        candidate = candidates[place]
        unfinished = candidate.finish == "delimiter"
        return order[candidate.finish], (deepest - candidate.depth) * unfinished, -candidate.score

    return min(range(len(candidates)), key=key)
