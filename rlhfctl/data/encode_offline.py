"""Scored trajectories -> token ids, action masks, steps and rewards, for training without rollouts."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from rlhfctl.collector import resting
from rlhfctl.data.encode import TOO_LONG, DropReport, SftRow, refuser, tools_of
from rlhfctl.data.encode_judged import NOT_FOUND
from rlhfctl.data.samples import Sample
from rlhfctl.data.templated import refuse_templated
from rlhfctl.errors import Refused
from rlhfctl.recipe.oreo_sections import OfflineReasoning
from rlhfctl.templates.encode import ChatEncoder, mask_of
from rlhfctl.templates.places import NotFound

TRUNCATED = "cut before their end"
NO_ACTION = "no action token"


@dataclass(slots=True)
class OfflineRow(SftRow):
    """mask: 1 on actions. steps: for each action token the number of its step; reward: what training uses."""

    steps: list[int]
    reward: float
    right: bool


@resting()
def encode_offline(
    samples: list[Sample], encoder: ChatEncoder, max_length: int, train_on: str, algorithm: OfflineReasoning
) -> tuple[list[OfflineRow], DropReport]:
    """Raises Refused for rows without a reward or with one outside `algorithm.reward_range`, for steps that do not
    rebuild their response, for prompts that a chat template has been around already, and for data of which
    nothing can be learnt."""
    rows: list[OfflineRow] = []
    report = DropReport()
    for sample in samples:
        given = reward_of(sample, algorithm)
        refuse_templated(sample, encoder.markers)
        cut = sample.metadata.get("truncated") is True or sample.metadata.get("finish") == "length"
        if cut and algorithm.truncated == "drop":
            report.drop(TRUNCATED, sample, "algorithm.truncated: drop")
            continue
        try:
            text, spans = encoder.spans(sample.conversation(), train_on, tools_of(sample))
            encoding = encoder.tokenizer.encode(text, add_special_tokens=False)
            ends = step_ends(sample, text, spans, algorithm, (*encoder.ends.tokens, encoder.ends.text))
        except NotFound as error:
            report.drop(NOT_FOUND, sample, str(error))
            continue
        except Exception as error:
            report.drop(refuser(error), sample, str(error))
            continue
        ids, mask = list(encoding.ids), mask_of(encoding.offsets, spans)
        if cut:  # its end was never written: no stop token, and nothing was reached
            for index in range(len(ids) - 1, -1, -1):
                if mask[index] and ids[index] not in encoder.stop_ids:
                    break
                mask[index] = 0
        mask[0] = 0  # nothing predicts the first token
        actions = [index for index, on in enumerate(mask) if on]
        if len(ids) > max_length:
            report.drop(TOO_LONG, sample, f"{len(ids)} tokens")
        elif not actions:
            report.drop(NO_ACTION, sample, "no assistant turn")
        else:
            right = given > algorithm.threshold and not cut
            starts = [encoding.offsets[index][0] for index in actions]
            rows.append(
                OfflineRow(
                    sample.id,
                    ids,
                    mask,
                    numbered(starts, ends),
                    algorithm.right if right else algorithm.wrong,
                    right,
                )
            )
    report.kept = len(rows)
    return rows, report


def reward_of(sample: Sample, algorithm: OfflineReasoning) -> float:
    """The row's own reward; of step-labelled rows without one: 1 where every step is right."""
    judgement = sample.judgement
    reward = None if judgement is None else judgement.reward
    if reward is None and judgement is not None and judgement.step_labels:
        reward = float(all(label is not None and label > 0.5 for label in judgement.step_labels))
    if reward is None:
        raise Refused(f"{sample.origin} has no reward: oreo learns from scored answers, pairs carry none")
    low, high = algorithm.reward_range
    if not low <= reward <= high:
        raise Refused(
            f"{sample.origin} has the reward {reward:g}, outside algorithm.reward_range [{low:g}, {high:g}]"
        )
    if judgement is not None and judgement.unmatched and algorithm.uses_steps:
        raise Refused(
            f"{sample.origin}: its steps joined by data.*.step_separator do not rebuild its response: correct "
            "step_separator, or drop the steps column"
        )
    return reward


def step_ends(
    sample: Sample,
    text: str,
    spans: Sequence[tuple[int, int]],
    algorithm: OfflineReasoning,
    closings: Sequence[str],
) -> list[int]:
    """Characters of `text` behind which a new step begins: after each delimiter inside an assistant turn (the row's own
    steps where it has them), and after each turn. A delimiter that nothing but a turn's end follows begins no step;
    closings: what ends a turn. Raises NotFound where steps are used and the row's own do not stand in the text."""
    judgement = sample.judgement
    ends: list[int] = []
    for start, end in spans:
        turn = text[start:end]
        content = sample.response if spans[-1] == (start, end) and sample.response is not None else None
        steps = judgement.steps if judgement is not None and content is not None else None
        if steps and judgement is not None:
            given = content or ""
            place = text.find(given.strip(), start)  # many templates trim
            if place < 0 and algorithm.uses_steps:
                raise NotFound("the chat template does not show the response as it is")
            lead = len(given) - len(given.lstrip())
            for step in steps[:-1] if place >= 0 else []:
                place += len(step) + len(judgement.separator)
                ends.append(place - lead)
        else:
            for place in range(len(turn)):
                for delimiter in algorithm.step_delimiters:
                    if turn.startswith(delimiter, place):
                        after = place + len(delimiter)
                        if turn[after:].strip() not in ("", *closings):
                            ends.append(start + after)
        ends.append(end)
    return sorted(set(ends))


def numbered(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The step of each action token, by the character it starts at, counted from 0 without gaps: a token that holds a
    delimiter and more closes the step."""
    steps: list[int] = []
    seen: dict[int, int] = {}
    for start in starts:
        steps.append(seen.setdefault(bisect_right(ends, start), len(seen)))
    return steps


def refuse_nothing_to_learn(rows: Sequence[OfflineRow], algorithm: OfflineReasoning) -> None:
    """Raises Refused where all rows are right or all wrong, or where no response has a second step and steps matter."""
    right = sum(row.right for row in rows)
    if right in (0, len(rows)):
        raise Refused(
            f"data.train holds {right} right and {len(rows) - right} wrong answers: without both there is nothing to "
            "learn from their difference; add the other kind, or look at algorithm.threshold"
        )
    if algorithm.uses_steps and all(row.steps[-1] == 0 for row in rows):
        shown = ", ".join(repr(delimiter) for delimiter in algorithm.step_delimiters)
        raise Refused(
            f"none of {len(rows)} responses holds a step delimiter ({shown}): set algorithm.step_delimiters, or "
            "algorithm.level: token without step_weights"
        )


def step_report(rows: Sequence[OfflineRow]) -> str:
    """One line on steps and rewards for the user."""
    counts = sorted(row.steps[-1] + 1 for row in rows)
    right = sum(row.right for row in rows)
    return (
        f"{len(rows)} trajectories, {right} right, {len(rows) - right} wrong; steps per trajectory: mean "
        f"{sum(counts) / len(counts):.1f}, from {counts[0]} to {counts[-1]}"
    )
