"""From judged answers to named estimates: docs/eval.md says what each name means."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhfctl.evaluation.answers import Answer
from rlhfctl.evaluation.estimates import (
    Estimate,
    auc,
    bootstrap,
    calibration_error,
    majority,
    mean,
    mean_share,
    paired_difference,
    pass_at_k,
    proportion,
    ratio,
)

if TYPE_CHECKING:
    from rlhfctl.evaluation.run import Row, State


def measure(rows: Sequence["Row"], method: str, n: int, seed: int) -> dict[str, Estimate]:
    """Prompts whose answers have no verdict are left out of what needs it."""
    found: dict[str, Estimate | None] = {}
    found |= of_answers([row.greedy for row in rows], "greedy")
    if any(row.samples for row in rows):
        found |= of_samples([row.samples for row in rows], n)
    chosen = [row.chosen for row in rows if row.chosen is not None]
    if chosen:
        found |= of_answers(chosen, method)
        found |= cost(chosen, method, [row.search_tokens for row in rows], [row.search_steps for row in rows])
    found |= of_values(rows, seed)
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def of_answers(answers: Sequence[Answer], method: str) -> dict[str, Estimate | None]:
    """One answer a prompt."""
    found = {
        f"accuracy/{method}": proportion([a.correct for a in answers if a.correct is not None]),
        f"path_accuracy/{method}": proportion(
            [a.path_correct for a in answers if a.path_correct is not None]
        ),
        f"first_wrong_step/{method}": mean(
            [
                a.first_wrong_step
                for a in answers
                if a.path_correct is False and a.first_wrong_step is not None
            ]
        ),
        f"truncated/{method}": proportion([a.truncated for a in answers]),
    }
    if method == "greedy":
        found |= cost(answers, method, [a.tokens for a in answers], [a.steps for a in answers])
    return found


def cost(
    answers: Sequence[Answer], method: str, tokens: Sequence[int], steps: Sequence[int]
) -> dict[str, Estimate | None]:
    """Everything that was generated, over the number of problems solved by it; both of the judged answers."""
    judged = [place for place, answer in enumerate(answers) if answer.correct is not None]
    solved = [float(bool(answers[place].correct)) for place in judged]
    return {
        f"steps_per_solved/{method}": ratio([steps[place] for place in judged], solved),
        f"tokens_per_solved/{method}": ratio([tokens[place] for place in judged], solved),
    }


def of_samples(groups: Sequence[Sequence[Answer]], n: int) -> dict[str, Estimate | None]:
    """n answers a prompt; prompts with a failed verdict are left out, because k of n needs all n."""
    judged = [group for group in groups if len(group) == n and all(a.correct is not None for a in group)]
    paths = [group for group in judged if all(a.path_correct is not None for a in group)]
    found: dict[str, Estimate | None] = {
        "accuracy/sample": mean_share([sum(bool(a.correct) for a in group) / n for group in judged]),
        "path_accuracy/sample": mean_share([sum(bool(a.path_correct) for a in group) / n for group in paths]),
        "truncated/sample": mean_share([sum(a.truncated for a in group) / n for group in groups if group]),
    }
    rights = [sum(bool(a.correct) for a in group) for group in judged]
    for k in sizes(n):
        found[f"pass@{k}"] = mean_share([pass_at_k(n, right, k) for right in rights])
    for k in sizes(n):
        votes = [voted_right(group, k) for group in judged]
        if k > 2:  # of two votes the first one wins
            found[f"majority@{k}"] = (
                proportion([bool(vote) for vote in votes]) if k == n else mean_share(votes)
            )
    return found


def sizes(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})


def voted_right(group: Sequence[Answer], k: int) -> float:
    """Share of right votes when the samples are taken k by k, in the order in which they were drawn."""
    blocks = [group[start : start + k] for start in range(0, len(group) - k + 1, k)]
    return sum(_vote(block) for block in blocks) / len(blocks)


def _vote(block: Sequence[Answer]) -> bool:
    """Whether the most frequent answer is right: as the verifier judged the first sample that gave it."""
    winner = majority([answer.extracted for answer in block])
    return winner is not None and bool(next(a.correct for a in block if a.extracted == winner))


def of_values(rows: Sequence["Row"], seed: int) -> dict[str, Estimate | None]:
    """How well V tells states apart: over the ends of the steps of all answers that V has read."""
    states = [row.states for row in rows if row.states]
    if not states:
        return {}

    def over_states(of: Sequence[Sequence["State"]], kind: str) -> float | None:
        flat = [state for group in of for state in group]
        if kind == "step_auc":
            known = [(state.value, state.step_right) for state in flat if state.step_right is not None]
            return auc([value for value, _ in known], [right for _, right in known])
        if kind == "auc":
            return auc([state.value for state in flat], [state.right for state in flat])
        return calibration_error([state.probability for state in flat], [state.right for state in flat])

    found: dict[str, Estimate | None] = {}
    for kind in ("auc", "step_auc", "calibration_error"):
        found[f"value/{kind}"] = bootstrap(states, lambda of, kind=kind: over_states(of, kind), seed)  # type: ignore[misc]
    return found


def gains(rows: Sequence["Row"], method: str) -> dict[str, Estimate]:
    """What a search gains over the greedy answers to the same prompts."""
    found: dict[str, Estimate | None] = {}
    pairs = [(row.chosen, row.greedy) for row in rows if row.chosen is not None]
    known = [(a.correct, b.correct) for a, b in pairs if None not in (a.correct, b.correct)]
    found[f"accuracy {method} - greedy"] = _difference(known)
    paths = [
        (a.path_correct, b.path_correct) for a, b in pairs if None not in (a.path_correct, b.path_correct)
    ]
    found[f"path_accuracy {method} - greedy"] = _difference(paths)
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _difference(pairs: Sequence[tuple[bool | None, bool | None]]) -> Estimate | None:
    return paired_difference([float(bool(a)) for a, _ in pairs], [float(bool(b)) for _, b in pairs])


def failures(rows: Sequence["Row"]) -> int:
    """Answers without a verdict, each counted once: best of n chooses one of the samples."""
    answers = {id(each): each for row in rows for each in (row.greedy, *row.samples, row.chosen) if each}
    return sum(answer.correct is None for answer in answers.values())
