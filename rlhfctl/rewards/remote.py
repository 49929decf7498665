"""`kind: remote`: a reward service over HTTP (rlhfctl serve-rm, or any that speaks its protocol).

Whole samples travel, answers are matched by id. Every failure is an outcome of the samples it concerns, and an answer
that breaks the protocol is a failure of all samples it was to answer: no score is guessed.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import RemoteSource, Template
from rlhfctl.rewards.outcome import Outcome, Span
from rlhfctl.rewards.remote_messages import adapters
from rlhfctl.rewards.remote_parts import DIVISIBLE, Part, divide, key_of
from rlhfctl.rewards.remote_servers import Permanent, Servers, Transient, agree
from rlhfctl.rewards.remote_text import text_hashes
from rlhfctl.serving.protocol import SCHEMA, Granularity, Info, Reward, SpanScore, problems
from rlhfctl.templates.bridge import opened_reasoning
from rlhfctl.templates.encode import ChatEncoder


@dataclass(frozen=True, slots=True)
class Sent:
    """What an answer to a sample is held against.

    opened: characters before the policy's own in the response that travels; length: of all of it. texts: hashes of
    which text_sha256 has to be one; none where that is not compared."""

    opened: int
    length: int
    texts: frozenset[str]


class RemoteReward:
    """A source: `score` gives one outcome a sample, in order, and raises for none of them.

    Raises Refused where the handshake fails, UsageError where the key's variable is not set.
    silent: servers that did not answer the handshake, and why, while others did.
    """

    def __init__(
        self,
        section: RemoteSource,
        policy: ChatEncoder | None = None,
        template: Template | None = None,
        granularity: Granularity = "sequence",
    ) -> None:
        """policy, template: as for a model in this process; what they ask for is done to messages before they leave.
        granularity: of the spans that are asked for where the source has a span_weight."""
        self.name, self.weight, self._section = "remote", section.weight, section
        self.span_weight = section.span_weight
        self.step_reward: str | None = None
        self._granularity = granularity if section.span_weight else "sequence"
        urls = section.urls or [section.url or ""]
        self._servers = Servers(
            urls, key_of(section), section.timeout, section.retries, section.max_in_flight
        )
        try:
            self.info, self.silent = agree(self._servers)
            self._check(self.info)
        except BaseException:
            self._servers.close()
            raise
        is_model = self.info.kind == "model"
        if is_model and self._granularity == "step":
            self.step_reward = section.step_reward
        self._opened = opened_reasoning(policy) if is_model and policy is not None else ""
        self._steps = self._granularity != "token" and "step" in self.info.granularities
        self._adapters = adapters(self.info, template) if is_model else []
        self._hashes = text_hashes(self.info)  # None once a batch was right
        self._other_text = False
        self._threads = ThreadPoolExecutor(section.max_in_flight, thread_name_prefix="reward")

    def _check(self, info: Info) -> None:
        """The handshake against what the recipe expects."""
        wanted, found = self._section.template_sha256, info.template.sha256 if info.template else None
        if wanted is not None and found != wanted:
            raise Refused(
                f"the reward server {info.name} scores through template {found or 'none (rules)'}, the recipe expects "
                f"{wanted} (reward.sources.*.template_sha256)"
            )
        wanted = self._section.fingerprint
        if wanted is not None and info.fingerprint != wanted:
            raise Refused(
                f"the reward server {info.name} has the fingerprint {info.fingerprint}, the recipe expects {wanted} "
                "(reward.sources.*.fingerprint)"
            )
        if "sequence" not in info.granularities:
            raise Refused(f"the reward server {info.name} gives no score for a whole response")
        if self._granularity not in info.granularities:
            raise Refused(
                f"the reward server {info.name} gives no scores of {self._granularity}s, but its source has a "
                f"span_weight and reward.granularity is {self._granularity}; it gives: {', '.join(info.granularities)}"
            )

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        deadline = time.monotonic() + self._section.total_timeout
        outcomes: list[Outcome | None] = [None] * len(samples)
        rows: Part = []
        sent: dict[int, Sent] = {}
        for place, sample in enumerate(samples):
            try:
                row, sent[place] = self._wire(sample)
                rows.append((place, row))
            except (TypeError, ValueError, AttributeError, RecursionError) as error:
                outcomes[place] = Outcome("error", error=f"{self.name}: the sample is no JSON: {error}")
        ids = [str(sample["id"]) for sample in samples]
        size = min(self._section.request_size, self.info.max_samples)
        parts = list(divide(rows, ids, size, self.info.max_body_bytes))
        for found in self._threads.map(lambda part: self._ask(part, ids, sent, deadline), parts):
            for place, outcome in found.items():
                outcomes[place] = outcome
        if not self._other_text and any(
            outcome is not None and outcome.status == "ok" for outcome in outcomes
        ):
            self._hashes = None
        lost = Outcome("missing", error=f"{self.name}: no answer for this sample")
        return [outcome or lost for outcome in outcomes]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._servers.close()

    def _wire(self, sample: dict[str, Any]) -> tuple[bytes, Sent]:
        """A sample as JSON. Raises ValueError (half of a surrogate pair, too) and TypeError."""
        response, messages = sample["response"], sample["messages"]
        own = len(response)
        if self._opened and not response.lstrip().startswith(self._opened.strip()):
            response = self._opened + response
        for adapt in self._adapters:
            messages = adapt(messages)
        row = {"id": str(sample["id"]), "messages": messages, "response": response}
        row |= {"label": sample["label"], "metadata": sample["metadata"]}
        wire = json.dumps(row, default=str, ensure_ascii=False).encode()
        texts = self._hashes(wire) if self._hashes is not None else frozenset()
        return wire, Sent(len(response) - own, len(response), texts)

    def _ask(self, part: Part, ids: list[str], sent: dict[int, Sent], deadline: float) -> dict[int, Outcome]:
        body = b'{"schema":%d,"granularity":"%s","samples":[%s]}' % (
            SCHEMA, self._granularity.encode(), b",".join(row for _, row in part),
        )  # fmt: skip
        try:
            answer = self._servers.post("/v1/rewards", body, deadline)
            rewards = self._rewards(answer, {ids[place]: sent[place] for place, _ in part})
        except Transient as error:
            outcome = Outcome("timeout" if error.late else "error", error=f"{self.name}: {error}")
        except Permanent as error:
            if error.status in DIVISIBLE and len(part) > 1:  # one bad sample must not take the others with it
                middle = len(part) // 2
                halves = (part[:middle], part[middle:])
                first, second = (self._ask(half, ids, sent, deadline) for half in halves)
                return first | second
            outcome = Outcome("error", error=f"{self.name}: {error}")
        else:
            return {place: rewards[ids[place]] for place, _ in part}
        return {place: outcome for place, _ in part}

    def _rewards(self, answer: Any, asked: dict[str, Sent]) -> dict[str, Outcome]:
        """Outcomes by id; one left out is `missing`. Raises Permanent for an answer that breaks the protocol."""
        if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
            raise Permanent("the answer holds no list of rewards")
        if answer.get("schema") != SCHEMA:
            raise Permanent(f"the answer has schema {answer.get('schema')}, not {SCHEMA}")
        model = answer.get("model")
        fingerprint = model.get("fingerprint") if isinstance(model, dict) else None
        if fingerprint != self.info.fingerprint:
            raise Permanent(
                f"the server scores with {fingerprint}, at the handshake it was {self.info.fingerprint}: "
                "its model was exchanged"
            )
        outcomes: dict[str, Outcome] = {}
        for entry in answer["rewards"]:
            identity = entry.get("id") if isinstance(entry, dict) else None
            if not isinstance(identity, str) or identity not in asked:
                raise Permanent(f"the answer has a reward for {identity!r}, which was not asked")
            if identity in outcomes:
                raise Permanent(f"the answer has two rewards for {identity!r}")
            outcomes[identity] = self._outcome(entry, asked[identity])
        absent = Outcome("missing", error=f"{self.name}: the answer has no reward for this sample")
        return {identity: outcomes.get(identity, absent) for identity in asked}

    def _outcome(self, entry: dict[str, Any], sent: Sent) -> Outcome:
        """Raises Permanent for the score of another text."""
        try:
            reward = Reward.model_validate(entry)
        except ValidationError as error:
            first = problems(error)[0]
            said = ": ".join(filter(None, first.values()))
            return Outcome("error", error=f"{self.name}: the answer's reward is not usable: {said}")
        for place, span in enumerate(reward.spans):
            if not span.start <= span.end <= sent.length:
                said = f"spans.{place}: [{span.start}, {span.end}) is no part of the response (0 to {sent.length})"
                return Outcome("error", error=f"{self.name}: the answer's reward is not usable: {said}")
        if sent.texts and reward.text_sha256 is not None and reward.text_sha256 not in sent.texts:
            self._other_text = True
            raise Permanent(
                f"the server {self.info.name} scored another text than its own template makes of the sample "
                f"{reward.id!r} (text_sha256 {reward.text_sha256[:12]}, here {min(sent.texts)[:12]}): serve it so that "
                "it renders through the template that its /v1/info tells, with nothing added"
            )
        error_text = None if reward.status == "ok" else f"{self.name}: {reward.error or reward.status}"
        spans, score = self._own(reward.spans, sent.opened), reward.score
        lowest = min((span.score for span in reward.spans), default=None)
        reads_steps = len(spans) < len(reward.spans) and score == lowest
        if reads_steps and score is not None:
            spans = spans or [Span(0, sent.length - sent.opened, score)]
            score = min(span.score for span in spans)
        return Outcome(reward.status, score, spans, reward.metrics, error_text, reward.text_sha256)

    def _own(self, spans: list[SpanScore], opened: int) -> list[Span]:
        """Spans of the response that the policy wrote, without the `opened` characters that its prompt did.

        The score of tokens that were all opened stays, before the first character: it is a part of the sum. A step
        that was all opened is none of the policy's, as for a model in this process: the score, which is the lowest
        step's, is the lowest of the others."""
        if self._steps:
            spans = [span for span in spans if span.start >= opened or span.end > opened]
        return [Span(max(span.start - opened, 0), max(span.end - opened, 0), span.score) for span in spans]
