"""Samples with a judgement -> what a reward model reads, through the pipeline that feeds it later too (the bridge)."""

from dataclasses import dataclass

from jinja2 import TemplateError

from rlhfctl.collector import resting
from rlhfctl.data.encode import TEMPLATE, TOKENIZER, TOO_LONG, DropReport
from rlhfctl.data.samples import Sample
from rlhfctl.recipe.sections import RewardModelling, Template
from rlhfctl.templates.bridge import Bridge, Bridged, BridgeOptions
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.places import NotFound, response_places, step_places

NOT_FOUND = "response not found in the rendered text"
NOTHING_JUDGED = "no judgement that the objective uses"
ALIKE = "both answers are the same tokens"


@dataclass(slots=True)
class Reading:
    """One conversation. response: indices of its answer's tokens; steps: the index where each step ends; both empty
    where the head does not need them."""

    ids: list[int]
    response: list[int]
    steps: list[int]


@dataclass(slots=True)
class JudgedRow:
    """rejected: None but for pairs. target: what the answer is worth, from 0 to 1. step_labels: as many as
    chosen.steps."""

    id: str
    chosen: Reading
    rejected: Reading | None
    margin: float
    target: float | None
    step_labels: list[float | None]

    @property
    def ids(self) -> list[int]:
        """The longer of its conversations."""
        readings = [self.chosen] + ([self.rejected] if self.rejected is not None else [])
        return max((reading.ids for reading in readings), key=len)

    @property
    def labelled(self) -> int:
        return sum(label is not None for label in self.step_labels)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is taken from a sample. objective: pairwise | outcome | step; steps: step labels too; tokens: the places of
    the response's tokens are needed."""

    objective: str
    steps: bool
    tokens: bool
    threshold: float


def wanted_of(algorithm: RewardModelling) -> Wanted:
    return Wanted(
        algorithm.objective, algorithm.steps, algorithm.score == "token_sum", algorithm.outcome_threshold
    )


def pipeline(section: Template, encoder: ChatEncoder) -> Bridge:
    """What renders and encodes for the trained model when it scores, and so in training."""
    return Bridge(None, encoder, BridgeOptions(section.fold_system, section.merge_roles))


@resting()
def encode_judged(
    samples: list[Sample], bridge: Bridge, max_length: int, wanted: Wanted
) -> tuple[list[JudgedRow], DropReport]:
    """Rows of which a conversation is longer than `max_length` are dropped, those that hold nothing the objective
    uses, and pairs of which a model would read the same twice."""
    rows: list[JudgedRow] = []
    report = DropReport()
    for sample in samples:
        row = _row(sample, bridge, wanted, max_length, report)
        if row is not None:
            rows.append(row)
    report.kept = len(rows)
    return rows, report


def _row(
    sample: Sample, bridge: Bridge, wanted: Wanted, max_length: int, report: DropReport
) -> JudgedRow | None:
    judgement = sample.judgement
    assert judgement is not None  # load_samples(judged=True) gives every sample one
    pair = judgement.rejected if wanted.objective in ("pairwise", "outcome") else None
    target = None
    if wanted.objective == "outcome":
        reward = judgement.reward
        if pair is not None:
            target = 1.0  # and 0 for the rejected side
        elif reward is not None:
            target = float(reward > wanted.threshold)
    labels = judgement.step_labels if wanted.steps and judgement.steps is not None else None
    if labels is not None and all(label is None for label in labels):
        labels = None
    if pair is None and target is None and labels is None:
        report.drop(NOTHING_JUDGED, sample, f"the objective is {wanted.objective}")
        return None
    steps = judgement.steps if labels is not None else None
    sides: list[Reading] = []
    conversation = sample.conversation()
    for messages in [conversation] + ([pair] if pair is not None else []):
        try:
            bridged = bridge.encode(messages[:-1], messages[-1]["content"])
            sides.append(_reading(bridge, bridged, steps if messages is conversation else None, wanted))
        except TemplateError as error:
            report.drop(TEMPLATE, sample, str(error))
            return None
        except NotFound as error:
            report.drop(NOT_FOUND, sample, str(error))
            return None
        except Exception as error:
            if type(error) is not Exception:  # all that tokenizers raises
                raise
            report.drop(TOKENIZER, sample, str(error))
            return None
    longest = max(len(side.ids) for side in sides)
    if longest > max_length:
        report.drop(TOO_LONG, sample, f"{longest} tokens")
        return None
    rejected = sides[1] if pair is not None else None
    # Texts may differ in whitespace alone, which templates trim.
    if rejected is not None and rejected.ids == sides[0].ids:
        report.drop(ALIKE, sample, "the chat template and the tokenizer make chosen and rejected equal")
        return None
    return JudgedRow(sample.id, sides[0], rejected, judgement.margin or 0.0, target, list(labels or []))


def _reading(bridge: Bridge, bridged: Bridged, steps: list[str] | None, wanted: Wanted) -> Reading:
    tokens = response_places(bridge.rm, bridged) if wanted.tokens else []
    ends = step_places(bridge.rm, bridged, steps) if steps is not None else []
    return Reading(bridged.ids, tokens, ends)
