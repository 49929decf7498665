"""The reward called on a few real rows, with a right and a wrong answer where there is a label (R...).

A reward model is not run here (no torch before launch): model.py checks its head, the template check its text. One
behind a remote source is asked like any other, but it is learned: it may fail on some odd text and may err.
"""

from dataclasses import dataclass, field

from rlhfctl.data.samples import Sample
from rlhfctl.errors import RlhfctlError
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, spread
from rlhfctl.preflight.weights import score_read
from rlhfctl.recipe.sections import ModelSource, RemoteSource, Reward
from rlhfctl.rewards.build import Source, build_sources
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.sample import reward_sample

GIVES = {"step_end": "step", "token_sum": "token"}  # how a reward model is read: what its spans are
ROWS = 8  # rows whose reward is tried
TEXTS = 24  # other responses tried on rows without an answer of their own
PLAIN = ("", "yes", "No.", "I do not know.", "42", "The answer is 7.", "#7", "\\boxed{7}", "a b c " * 40)


@dataclass(slots=True)
class Probe:
    """One row and the responses tried on it: right answers (their best counts), wrong ones, and any others."""

    sample: Sample
    right: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [*self.right, *self.wrong, *self.other]


def check(inputs: Inputs) -> list[Finding]:
    reward = inputs.recipe.reward
    if reward is None or inputs.quick:
        return []
    split = "train" if inputs.answered("train") else "eval"
    samples = inputs.samples(split).samples
    findings = unlabelled(inputs, samples) + model_spans(inputs)
    callable_sources = [source for source in reward.sources if not isinstance(source, ModelSource)]
    if not callable_sources or findings:
        return findings
    probes = make_probes(samples)
    try:
        rendered = any(isinstance(each, RemoteSource) and each.query == "rendered" for each in reward.sources)
        sources = build_sources(
            reward.model_copy(update={"sources": callable_sources}),
            inputs.encoder if rendered else None,
            inputs.recipe.template,
        )
    except RlhfctlError as error:
        return [
            *findings,
            Finding(
                "R001",
                "error",
                "a reward source cannot be set up",
                error.message,
                side="reward",
                exit_code=error.exit_code,
            ),
        ]
    try:
        found = [source_findings(source, probes) for source in sources]
    finally:
        for source in sources:
            source.close()
    silent = [finding for source in sources for finding in silent_servers(source)]
    return (
        findings
        + silent
        + unseen_templates(reward)
        + judged_together(found, [pays(source) for source in sources])
    )


def judged_together(found: list[list[Finding]], paying: list[bool]) -> list[Finding]:
    """A source that alone would train nothing, or the wrong thing, may stand beside one that knows better: a length
    term beside a verifier, say. Then it is a warning."""
    signal = [
        pays and not any(finding.severity == "error" for finding in findings)
        for findings, pays in zip(found, paying, strict=True)
    ]
    for findings in found:
        for finding in findings:
            if any(signal) and finding.id in ("R003", "R004") and finding.severity == "error":
                finding.severity = "warning"
    return [finding for findings in found for finding in findings]


def unlabelled(inputs: Inputs, samples: list[Sample]) -> list[Finding]:
    """R005: a verifier needs a label in every row."""
    if not inputs.verifiers:
        return []
    without = [sample for sample in samples if sample.label is None]
    allowed = inputs.recipe.reward.max_failures if inputs.recipe.reward is not None else 0
    if not without:
        return []
    names = ", ".join(source.name for source in inputs.verifiers)
    return [
        Finding(
            "R005",
            "error" if len(without) > allowed else "warning",
            f"{len(without)} of {len(samples)} rows have no label for {names}",
            f"first: {', '.join(sample.origin or sample.id for sample in without[:5])}",
            "name the column of the answer with data.*.columns, e.g. {solution: label}",
            "reward",
        )
    ]


def model_spans(inputs: Inputs) -> list[Finding]:
    """R007, R008: reward models that cannot give the spans, or the redistribution, that the recipe asks for."""
    reward = inputs.recipe.reward
    assert reward is not None
    findings, spread = [], reward.shaping.redistribution != "none"
    reads = [score_read(inputs.config(source.path)) for source in inputs.reward_models]
    for source, read in zip(inputs.reward_models, reads, strict=True):
        if source.span_weight and read is not None and GIVES.get(read) != reward.granularity:
            findings.append(
                Finding(
                    "R007",
                    "error",
                    f"reward model {source.path} gives no scores of {reward.granularity}s",
                    f"it reads {read}, its source has a span_weight and reward.granularity is {reward.granularity}",
                    "step needs a model that reads step_end, token one that reads token_sum (rlhfctl rm trains both)",
                    "reward",
                )
            )
    if spread and "last_token" not in reads and None not in reads:
        findings.append(
            Finding(
                "R008",
                "error",
                "no reward model has a score that reward.shaping.redistribution could spread",
                f"it needs one that reads last_token; here: {', '.join(map(str, reads))}",
                "leave redistribution out; token_sum and step_end have granularity token and step",
                "reward",
            )
        )
    return findings


def make_probes(samples: list[Sample]) -> list[Probe]:
    """Rows spread over the data; each row's wrong answer is the answer of a row with another label."""
    chosen, _ = spread(samples, ROWS)
    texts = [text for sample in spread(samples, TEXTS)[0] for text in plain_texts(sample)][:TEXTS]
    probes = []
    for place, sample in enumerate(chosen):
        probe = Probe(sample, right_answers(sample))
        others = chosen[place + 1 :] + chosen[:place]
        differing = next(
            (other for other in others if other.label is not None and other.label != sample.label), None
        )
        if probe.right and differing is not None:
            probe.wrong = right_answers(differing)
        if not probe.right or not probe.wrong:
            probe.other = list(dict.fromkeys([*PLAIN, *texts]))
        probes.append(probe)
    return probes


def right_answers(sample: Sample) -> list[str]:
    """The row's own answer, and its label in the forms that verifiers read; [] for a row with neither."""
    answers = []
    own = sample.response
    if own is None and sample.messages and sample.messages[-1].get("role") == "assistant":
        own = str(sample.messages[-1].get("content") or "")
    if own:
        answers.append(own)
    if sample.label is not None:
        label = str(sample.label)
        answers += [label, f"#{label}", f"#### {label}", f"\\boxed{{{label}}}", f"The answer is {label}."]
    return answers


def plain_texts(sample: Sample) -> list[str]:
    contents = [message.get("content") for message in sample.conversation()]
    return [content for content in contents if isinstance(content, str) and content]


def silent_servers(source: Source) -> list[Finding]:
    """R006: a remote source has several servers, and some did not answer."""
    return [
        Finding(
            "R006",
            "warning",
            f"the reward server {url} does not answer",
            why,
            "the others are used; it is asked again when it is back",
            "reward",
        )
        for url, why in getattr(source, "silent", {}).items()
    ]


def unseen_templates(reward: Reward) -> list[Finding]:
    """R009: prompts rendered for the policy go to a server that does not tell its template."""
    return [
        Finding(
            "R009",
            "warning",
            f"the reward server {source.url or str(source.urls)} gets prompts in the policy's chat template",
            "a reward model scores texts in another format than its own without an error, and worse; protocol openrlhf "
            "does not tell what it was trained on",
            "send query: plain to rules; serve a reward model with rlhfctl serve-rm and protocol rlhfctl, or put R009 "
            "into template.allow where both templates are the same",
            "reward",
        )
        for source in reward.sources
        if isinstance(source, RemoteSource) and source.query == "rendered"
    ]


def is_learned(source: Source) -> bool:
    """A reward model behind a remote source."""
    return getattr(getattr(source, "info", None), "kind", "") == "model"


def pays(source: Source) -> bool:
    """Not one that is only there to be read: what it likes trains nothing."""
    return bool(source.weight or source.span_weight)


def source_findings(source: Source, probes: list[Probe]) -> list[Finding]:
    """R002 a failure, R003 a constant, R004 wrong answers liked as much as right ones."""
    batch = [reward_sample(probe.sample, text) for probe in probes for text in probe.texts]
    outcomes = source.score(batch)
    failed = [outcome for outcome in outcomes if outcome.status != "ok" or outcome.score is None]
    if failed:
        causes = list(dict.fromkeys(outcome.error or outcome.status for outcome in failed))
        return [
            Finding(
                "R002",
                "warning" if is_learned(source) and len(failed) < len(batch) else "error",
                f"reward {source.name} failed on {len(failed)} of {len(batch)} tried responses",
                "; ".join(causes[:3]),
                "correct the reward function; it must give a finite number for any response",
                "reward",
                {"statuses": sorted({outcome.status for outcome in failed})},
            )
        ]
    if source.span_weight and not any(outcome.spans for outcome in outcomes):
        return [
            Finding(
                "R007",
                "error",
                f"reward {source.name} has a span_weight and gave no spans for any of {len(batch)} tried responses",
                "reward.granularity step and token reward the spans of a source",
                "give spans, or leave span_weight out: then its score of the whole response counts alone",
                "reward",
            )
        ]
    if not pays(source):
        return []
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    if len(set(scores)) == 1:
        return [
            Finding(
                "R003",
                "error",
                f"reward {source.name} gave {scores[0]:g} to all {len(batch)} tried responses",
                f"{len({sample['response'] for sample in batch})} different texts on {len(probes)} rows; "
                "a constant reward trains nothing",
                "correct the reward; if it is meant to be this rare, put R003 into template.allow",
                "reward",
                {"score": scores[0]},
            )
        ]
    return preference_findings(source, probes, outcomes)


def preference_findings(source: Source, probes: list[Probe], outcomes: list[Outcome]) -> list[Finding]:
    """Compare right with wrong on the labelled rows: none told apart is an error, some are a warning."""
    compared, not_better = 0, []
    place = 0
    for probe in probes:
        scores = [outcome.score or 0.0 for outcome in outcomes[place : place + len(probe.texts)]]
        place += len(probe.texts)
        if probe.sample.label is None or not probe.wrong:
            continue
        compared += 1
        right, wrong = scores[: len(probe.right)], scores[len(probe.right) :][: len(probe.wrong)]
        if max(right) <= max(wrong):
            not_better.append(probe.sample)
    if not not_better:
        return []
    named = ", ".join(sample.origin or sample.id for sample in not_better[:5])
    return [
        Finding(
            "R004",
            "error" if len(not_better) == compared and not is_learned(source) else "warning",
            f"reward {source.name} scores a right answer no higher than a wrong one on {len(not_better)} of "
            f"{compared} labelled rows",
            f"rows {named}; tried: the row's own answer and its label in the usual forms",
            "check that the label is what the reward compares with",
            "reward",
        )
    ]
