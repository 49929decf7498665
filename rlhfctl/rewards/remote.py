"""`kind: remote`: a reward service over HTTP (rlhfctl serve-rm, or any that speaks its protocol).

Whole samples travel, answers are matched by id. Every failure is an outcome of the samples it concerns, and an answer
that breaks the protocol is a failure of all samples it was to answer: no score is guessed.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError

from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import RemoteSource, Template
from rlhfctl.rewards.outcome import Outcome, Span
from rlhfctl.rewards.remote_messages import adapters
from rlhfctl.rewards.remote_parts import DIVISIBLE, Part, divide, key_of
from rlhfctl.rewards.remote_servers import Permanent, Servers, Transient, agree
from rlhfctl.serving.protocol import SCHEMA, Granularity, Info, Reward, problems
from rlhfctl.templates.bridge import opened_reasoning
from rlhfctl.templates.encode import ChatEncoder


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
        self._adapters = adapters(self.info, template) if is_model else []
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
        for place, sample in enumerate(samples):
            try:
                rows.append((place, self._wire(sample)))
            except (TypeError, ValueError, AttributeError, RecursionError) as error:
                outcomes[place] = Outcome("error", error=f"{self.name}: the sample is no JSON: {error}")
        ids = [str(sample["id"]) for sample in samples]
        size = min(self._section.request_size, self.info.max_samples)
        parts = list(divide(rows, ids, size, self.info.max_body_bytes))
        for found in self._threads.map(lambda part: self._ask(part, ids, deadline), parts):
            for place, outcome in found.items():
                outcomes[place] = outcome
        lost = Outcome("missing", error=f"{self.name}: no answer for this sample")
        return [outcome or lost for outcome in outcomes]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._servers.close()

    def _wire(self, sample: dict[str, Any]) -> bytes:
        """A sample as JSON. Raises ValueError (half of a surrogate pair, too) and TypeError."""
        response, messages = sample["response"], sample["messages"]
        if self._opened and not response.lstrip().startswith(self._opened.strip()):
            response = self._opened + response
        for adapt in self._adapters:
            messages = adapt(messages)
        row = {"id": str(sample["id"]), "messages": messages, "response": response}
        row |= {"label": sample["label"], "metadata": sample["metadata"]}
        return json.dumps(row, default=str, ensure_ascii=False).encode()

    def _ask(self, part: Part, ids: list[str], deadline: float) -> dict[int, Outcome]:
        body = b'{"schema":%d,"granularity":"%s","samples":[%s]}' % (
            SCHEMA, self._granularity.encode(), b",".join(row for _, row in part),
        )  # fmt: skip
        try:
            answer = self._servers.post("/v1/rewards", body, deadline)
            rewards = self._rewards(answer, [ids[place] for place, _ in part])
        except Transient as error:
            outcome = Outcome("timeout" if error.late else "error", error=f"{self.name}: {error}")
        except Permanent as error:
            if error.status in DIVISIBLE and len(part) > 1:  # one bad sample must not take the others with it
                middle = len(part) // 2
                return self._ask(part[:middle], ids, deadline) | self._ask(part[middle:], ids, deadline)
            outcome = Outcome("error", error=f"{self.name}: {error}")
        else:
            return {place: rewards[ids[place]] for place, _ in part}
        return {place: outcome for place, _ in part}

    def _rewards(self, answer: Any, asked: list[str]) -> dict[str, Outcome]:
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
            if identity not in asked:
                raise Permanent(f"the answer has a reward for {identity!r}, which was not asked")
            if identity in outcomes:
                raise Permanent(f"the answer has two rewards for {identity!r}")
            outcomes[identity] = self._outcome(entry)
        absent = Outcome("missing", error=f"{self.name}: the answer has no reward for this sample")
        return {identity: outcomes.get(identity, absent) for identity in asked}

    def _outcome(self, entry: dict[str, Any]) -> Outcome:
        try:
            reward = Reward.model_validate(entry)
        except ValidationError as error:
            first = problems(error)[0]
            said = ": ".join(filter(None, first.values()))
            return Outcome("error", error=f"{self.name}: the answer's reward is not usable: {said}")
        spans = [Span(span.start, span.end, span.score) for span in reward.spans]
        error_text = None if reward.status == "ok" else f"{self.name}: {reward.error or reward.status}"
        return Outcome(reward.status, reward.score, spans, reward.metrics, error_text, reward.text_sha256)
