"""From what the sources say of parts of a response to one reward per response token, and how far sources agree."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhfctl.algorithms.spans_to_tokens import spans_to_tokens
from rlhfctl.algorithms.step_rewards import step_rewards
from rlhfctl.recipe.sections import Reward
from rlhfctl.rewards.build import Source
from rlhfctl.rewards.outcome import Outcome, Span
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.response_offsets import response_offsets
from rlhfctl.trainers.trajectory import Trajectory


def wanted(reward: Reward) -> bool:
    """Whether spans are rewarded, or the score of a response is spread over its tokens."""
    return reward.granularity != "sequence" or reward.shaping.redistribution != "none"


def token_scores(
    trajectory: Trajectory,
    sources: Sequence[Source],
    outcomes: Mapping[str, Outcome],
    reward: Reward,
    encoder: ChatEncoder,
) -> Tensor:
    """[T], not shaped: with granularity step or token the sum over sources of span_weight x span scores; with
    redistribution of weight x what each token adds to the reward model's score."""
    spread = reward.shaping.redistribution != "none"
    offsets = torch.tensor(response_offsets(encoder, trajectory.response_ids, trajectory.text))
    total = torch.zeros(len(trajectory.response_ids))
    for source in sources:
        weight = source.weight if spread else source.span_weight
        spans = outcomes[source.name].spans
        if not weight or not spans or (spread and not spreads(source, outcomes)):
            continue
        places = torch.tensor([(span.start, span.end) for span in spans])
        scores = span_scores(source, spans)
        by_token = spread or reward.granularity == "token"
        total += weight * spans_to_tokens(offsets, places, scores, trajectory.mask, by_token)
    return total


def spreads(source: Source, outcomes: Mapping[str, Outcome]) -> bool:
    """Whether redistribution spreads this source's score of this response."""
    return bool(source.weight and outcomes[source.name].spans and getattr(source, "spreads", False))


def unspread(sources: Sequence[Source], outcomes: Mapping[str, Outcome]) -> float | None:
    """The weighted scores of the sources that spread nothing over the response; None where none does."""
    whole = [source for source in sources if not spreads(source, outcomes)]
    if len(whole) == len(sources):
        return None
    return sum(source.weight * (outcomes[source.name].score or 0.0) for source in whole)


def span_scores(source: Source, spans: Sequence[Span]) -> Tensor:
    """The scores that are rewarded: a process reward model's logits through its step_reward, others as they are."""
    scores = torch.tensor([span.score for span in spans])
    form = getattr(source, "step_reward", None)
    return scores if form is None else step_rewards(scores, form)


def step_agreement(sources: Sequence[Source], outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Of one response: where a process reward model and a rule judge the same steps (spans with the same ends).

    step_agreement: share of steps called right (P >= 1/2) or wrong by both; first_wrong_step_found: whether the first
    wrong step is the model's first one too, of responses that have one.
    """
    models = [source for source in sources if getattr(source, "step_reward", None) is not None]
    rules = [source for source in sources if getattr(source, "step_reward", None) is None]
    for model in models:
        called = {span.end: span.score >= 0 for span in outcomes[model.name].spans}
        for rule in rules:
            truth = {span.end: span.score > 0 for span in outcomes[rule.name].spans}
            if not truth or set(called) != set(truth):
                continue
            ends = sorted(truth)
            found = {"step_agreement": sum(called[end] == truth[end] for end in ends) / len(ends)}
            wrong = next((end for end in ends if not truth[end]), None)
            if wrong is not None:
                first = next((end for end in ends if not called[end]), None)
                found["first_wrong_step_found"] = float(first == wrong)
            return found
    return {}
