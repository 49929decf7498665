"""One evaluation from its settings to its result: load, answer, judge, measure, write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging

from rlhfctl.architectures import longest_row
from rlhfctl.data import overlap
from rlhfctl.data.encode import PromptRow, encode_prompts
from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused, UsageError
from rlhfctl.evaluation import collect, compare, guided, measures, results
from rlhfctl.evaluation.answers import Answer, Judge
from rlhfctl.evaluation.estimates import Estimate
from rlhfctl.evaluation.settings import Settings
from rlhfctl.evaluation.subject import Subject, open_subject
from rlhfctl.models.load import config_of, load_causal_lm
from rlhfctl.models.tokenizer import policy_encoder
from rlhfctl.rewards.build import build_sources
from rlhfctl.rollout.delimiters import Delimiters
from rlhfctl.rollout.engine import build_engine
from rlhfctl.rollout.types import Request, Rollout, Sampling
from rlhfctl.templates.encode import ChatEncoder

Say = Callable[[str], None]


@dataclass(slots=True)
class State:
    """The end of a step as a value model sees it. value: V; probability: V as the chance of success, in [0, 1]; right:
    whether the answer is correct in the end; step_right: whether all steps so far are, None where nobody says."""

    value: float
    probability: float
    right: bool
    step_right: bool | None


@dataclass(slots=True)
class Row:
    """One prompt and what came of it. greedy is always there, samples and chosen as --search asks; states: of the
    answers that a value model has read."""

    prompt: PromptRow
    greedy: Answer
    samples: list[Answer] = field(default_factory=list)
    chosen: Answer | None = None
    search_tokens: int = 0  # sampled in all, discarded candidates too
    search_steps: int = 0
    states: list[State] = field(default_factory=list)


@dataclass(slots=True)
class Result:
    """method: the name of what was asked for (greedy, sample_8, best_of_4, beam_4). facts: for the object of --json."""

    method: str
    measures: dict[str, Estimate]
    differences: dict[str, Estimate]
    facts: dict[str, Any]


class Answerer:
    """The policy and what it is asked with."""

    def __init__(self, subject: Subject, settings: Settings, say: Say) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder: ChatEncoder = policy_encoder(subject.policy, say)
        self.tokenizer = str(subject.policy.tokenizer or subject.policy.path)
        self.policy = load_causal_lm(subject.policy, self.device, settings.seed)
        self.delimiters = Delimiters(
            settings.ends, lambda ids: str(self.encoder.tokenizer.decode(ids, skip_special_tokens=False))
        )
        self.spec, self.seed = subject.rollout, settings.seed
        self.longest_prompt: int | None = None
        context = longest_row(config_of(self.policy).to_dict())
        if context is not None:
            if self.spec.max_new_tokens >= context and settings.max_new_tokens is not None:
                raise UsageError(
                    f"--max-new-tokens {settings.max_new_tokens} leaves no room for a prompt: "
                    f"the model's context is {context}"
                )
            if self.spec.max_new_tokens >= context:  # nobody asked for so many: half of the context each
                self.spec = self.spec.model_copy(update={"max_new_tokens": context // 2})
            self.longest_prompt = context - self.spec.max_new_tokens
        self.engine = build_engine(self.spec, self.policy, say=say)
        self.engine.sync(self.policy, 0)

    def sampling(self, greedy: bool, step: int = 0) -> Sampling:
        return Sampling(
            self.spec.max_new_tokens,
            0.0 if greedy else self.spec.temperature,
            self.spec.top_p,
            self.encoder.stop_ids,
            self.seed,
            step,
            self.spec.max_batch_tokens,
        )

    def greedy(self, prompts: Sequence[PromptRow]) -> list[Rollout]:
        requests = [Request(place, prompt.ids) for place, prompt in enumerate(prompts)]
        return self.engine.generate(requests, self.sampling(True))

    def sample(self, prompts: Sequence[PromptRow], n: int) -> list[Rollout]:
        """n for each prompt, side by side."""
        requests = [
            Request(place * n + k, prompt.ids) for place, prompt in enumerate(prompts) for k in range(n)
        ]
        return self.engine.generate(requests, self.sampling(False))


def evaluate(settings: Settings, say: Say) -> Result:
    """Raises UsageError, Refused and what loading raises. say: one line of progress."""
    settings.take_own_value_model()
    settings.check()
    logging.disable_progress_bar()
    subject = open_subject(settings)
    other = compare.read(settings.compare) if settings.compare else None
    samples = load_samples(subject.data, subject.max_bad_rows).samples[: settings.limit]
    answerer = Answerer(subject, settings, say)
    prompts, dropped = encode_prompts(samples, answerer.encoder, answerer.longest_prompt)
    if not prompts:
        raise Refused(f"no prompt is left to evaluate on: {dropped.sentence()}")
    if other is not None:
        compare.refuse_strangers([prompt.sample.id for prompt in prompts], other)
        if warning := compare.other_prompts([prompt.sample for prompt in prompts], other):
            say(warning)
    if len(prompts) < len(samples):
        say(f"warning: {dropped.sentence()}")
    overlaps = (
        0 if settings.trajectories else overlap.overlapping([p.sample for p in prompts], subject.trained_on)
    )
    if overlaps:
        say(
            f"warning: {overlaps} of {len(prompts)} prompts are in the training data too: their answers may be memory"
        )
    results.refuse_unwritable(settings, [source.path for source in subject.data])
    guide = guided.load_guide(settings, answerer)
    sources = build_sources(subject.reward, answerer.encoder)
    try:
        judge = Judge(sources, answerer.encoder, answerer.delimiters)
        rows = _answer(settings, answerer, judge, prompts, say)
        if guide is not None:
            guided.choose(guide, settings, answerer, judge, rows, say)
    finally:
        for source in sources:
            source.close()
    method = {"greedy": "greedy", "sample": f"sample_{settings.samples}"}.get(
        settings.search, f"{settings.search.replace('-', '_').removesuffix('_n')}_{settings.samples}"
    )
    result = Result(
        method,
        measures.measure(rows, method, settings.samples, settings.seed),
        measures.gains(rows, method),
        {
            "model": str(subject.policy.path),
            "data": [source.path for source in subject.data],
            "prompts": len(prompts),
            "dropped": dict(dropped.dropped),
            "overlap": overlaps,
            "failures": measures.failures(rows),
            "seed": settings.seed,
        },
    )
    records = results.records(rows, method)
    if other is not None:
        result.differences |= compare.differences(records, other)
    if settings.out is not None:
        result.facts["out"] = str(results.write(settings.out, records, result))
    if settings.trajectories is not None:
        counts = collect.write(settings.trajectories, rows, settings.balance, settings.ends)
        result.facts["trajectories"] = {"path": str(settings.trajectories), **counts}
        say(collect.sentence(settings.trajectories, counts))
    return result


def _answer(
    settings: Settings, answerer: Answerer, judge: Judge, prompts: list[PromptRow], say: Say
) -> list[Row]:
    say(f"{len(prompts)} prompts, greedy")
    answers = judge(prompts, answerer.greedy(prompts))
    rows = [Row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    if settings.search in ("sample", "best-of-n"):
        n = settings.samples
        say(f"{len(prompts)} prompts, {n} samples each at temperature {answerer.spec.temperature:g}")
        repeated = [prompt for prompt in prompts for _ in range(n)]
        sampled = judge(repeated, answerer.sample(prompts, n))
        for place, row in enumerate(rows):
            row.samples = sampled[place * n : (place + 1) * n]
    return rows
