"""Answers and what the verifier says of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhfctl.data.encode import PromptRow
from rlhfctl.errors import Refused
from rlhfctl.rewards.build import Source
from rlhfctl.rewards.child import ChildDied, ChildTimeout
from rlhfctl.rewards.extract import EXTRACT, extract_all
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.sample import reward_sample
from rlhfctl.rewards.score import score_samples
from rlhfctl.rollout.delimiters import Delimiters
from rlhfctl.rollout.types import Rollout
from rlhfctl.templates.encode import ChatEncoder


@dataclass(slots=True)
class Answer:
    """tokens: response tokens, the stop token included; truncated: cut by the token or the step limit. logprob: of the
    whole response, in nats, at the sampling temperature. extracted: what a vote counts. correct, path_correct,
    first_wrong_step, reward: the verifier's; None where it does not say, or failed (`failure`). steps_right: whether
    all steps up to each one are right. score: what a ranking gave. ids: not written."""

    text: str
    ids: list[int]
    tokens: int
    truncated: bool
    logprob: float
    steps: int
    extracted: str | None = None
    correct: bool | None = None
    path_correct: bool | None = None
    first_wrong_step: int | None = None
    steps_right: list[bool] | None = None
    reward: float | None = None
    score: float | None = None
    failure: str | None = None

    def record(self) -> dict[str, Any]:
        """For results.jsonl."""
        return {key: value for key, value in asdict(self).items() if key != "ids" and value is not None}


class Judge:
    """delimiters: what ends a step."""

    def __init__(self, sources: list[Source], encoder: ChatEncoder, delimiters: Delimiters) -> None:
        self.sources, self.encoder, self.delimiters = sources, encoder, delimiters

    def __call__(self, prompts: Sequence[PromptRow], rollouts: Sequence[Rollout]) -> list[Answer]:
        """One answer a rollout; prompts[i] is what rollouts[i] answers."""
        answers = [self._read(rollout) for rollout in rollouts]
        samples = [
            reward_sample(prompt.sample, answer.text) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        scored = score_samples(self.sources, samples)
        read_by: dict[str, list[Answer]] = {}
        for place, answer in enumerate(answers):
            source = self._fill(answer, [outcomes[place] for outcomes in scored.outcomes.values()])
            answer.reward = scored.totals[place]
            if source is not None:
                read_by.setdefault(verifier_of(source), []).append(answer)
        for verifier, read in read_by.items():
            _extract(verifier, read)
        if answers and all(answer.correct is None for answer in answers):
            first = next((answer.failure for answer in answers if answer.failure), None)
            names = ", ".join(source.name for source in self.sources)
            raise Refused(
                f"no answer could be judged: {first}"
                if first
                else f"{names} does not say whether an answer is correct (no metric `correct`): give --verifier NAME"
            )
        return answers

    def _read(self, rollout: Rollout) -> Answer:
        text = self.encoder.decode_response(rollout.response_ids)
        return Answer(
            text=text,
            ids=rollout.response_ids,
            tokens=len(rollout.response_ids),
            truncated=rollout.finish != "stop",
            logprob=float(rollout.logprobs.sum()),
            steps=len(self.delimiters.split(text)),
        )

    def _fill(self, answer: Answer, outcomes: list[Outcome]) -> str | None:
        """Returns the name of the source that says whether the answer is correct."""
        judge = None
        for source, outcome in zip(self.sources, outcomes, strict=True):
            if outcome.status != "ok":
                answer.failure = answer.failure or f"{source.name}: {outcome.error or outcome.status}"
                continue
            if answer.correct is not None or "correct" not in outcome.metrics:
                continue
            answer.correct = bool(outcome.metrics["correct"])
            judge = source.name
            if "path_correct" in outcome.metrics:
                answer.path_correct = bool(outcome.metrics["path_correct"])
            if "first_wrong_step" in outcome.metrics:
                answer.first_wrong_step = int(outcome.metrics["first_wrong_step"])
            if "path_correct" in outcome.metrics and outcome.spans:
                right, so_far = [], True
                for span in outcome.spans:
                    so_far = so_far and bool(span.score)
                    right.append(so_far)
                answer.steps_right = right
        return judge


def verifier_of(source: str) -> str:
    """How a source's answers are read: its own way (`math_answer#2` is math_answer's), of a function: mathematics."""
    name = source.partition("#")[0]
    return name if name in EXTRACT else "math_answer"


def _extract(verifier: str, answers: list[Answer]) -> None:
    try:
        found = extract_all(verifier, [answer.text for answer in answers])
    except (ChildTimeout, ChildDied) as error:
        for answer in answers:
            answer.failure = f"{verifier}: the process that runs programs {error}"
        return
    for answer, text in zip(answers, found, strict=True):
        answer.extracted = text
