"""Samples through every source: weighted sums, and an account of what failed."""

import json
from dataclasses import dataclass, field
from typing import Any

from rlhfctl.rewards.build import Source
from rlhfctl.rewards.outcome import Outcome


@dataclass(slots=True)
class Scored:
    """totals[i]: sum of weight x score over the sources, None where a source gave sample i no score.

    outcomes: source name -> one outcome a sample. metrics: means over the samples that have them: `NAME` of each
    metric that the sources report (correct, parsable, ...), `reward/SOURCE` of each source's unweighted score
    where there are several, and `reward/failures`, a count. failures: rows for quarantine.jsonl.
    """

    totals: list[float | None]
    outcomes: dict[str, list[Outcome]]
    metrics: dict[str, float] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)


def score_samples(sources: list[Source], samples: list[dict[str, Any]]) -> Scored:
    outcomes: dict[str, list[Outcome]] = {}
    for source in sources:
        given = source.score(samples)
        if len(given) != len(samples):
            raise AssertionError(f"{source.name} gave {len(given)} outcomes for {len(samples)} samples")
        outcomes[source.name] = [
            without_spans(source, outcome, sample) if source.span_weight else outcome
            for outcome, sample in zip(given, samples, strict=True)
        ]
    totals = [_total(sources, outcomes, index) for index in range(len(samples))]
    failures = [
        quarantine_record(name, outcome, sample)
        for name, given in outcomes.items()
        for outcome, sample in zip(given, samples, strict=True)
        if outcome.status != "ok"
    ]
    return Scored(totals, outcomes, _metrics(outcomes), failures)


def without_spans(source: Source, outcome: Outcome, sample: dict[str, Any]) -> Outcome:
    """A source whose spans are counted and that gives none for a text has no score for it: nothing is not zero."""
    if outcome.status != "ok" or outcome.spans or not sample["response"].strip():
        return outcome
    return Outcome("missing", error=f"{source.name}: a score without spans, and the source has a span_weight")


def quarantine_record(source: str, outcome: Outcome, sample: dict[str, Any]) -> dict[str, Any]:
    """What quarantine.jsonl keeps of a failed reward: the cause, and the whole sample to try it again with."""
    # Through JSON and back: what a table holds (dates, decimals) is written as the text a reward function sees.
    plain = json.loads(json.dumps(sample, default=str))
    return {
        "id": sample["id"],
        "source": source,
        "status": outcome.status,
        "error": outcome.error,
        "sample": plain,
    }


def _total(sources: list[Source], outcomes: dict[str, list[Outcome]], index: int) -> float | None:
    total = 0.0
    for source in sources:
        score = outcomes[source.name][index].score
        if score is None:
            return None
        total += source.weight * score
    return total


def _metrics(outcomes: dict[str, list[Outcome]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for name, given in outcomes.items():
        for outcome in given:
            for key, value in outcome.metrics.items():
                values.setdefault(key, []).append(value)
            if outcome.score is not None and len(outcomes) > 1:
                values.setdefault(f"reward/{name}", []).append(outcome.score)
    failed = sum(outcome.status != "ok" for given in outcomes.values() for outcome in given)
    return {key: sum(seen) / len(seen) for key, seen in values.items()} | {"reward/failures": float(failed)}
