"""`kind: remote, protocol: openrlhf`: a client of servers that know a query string, its prompt and its label.

    POST {"query": [...], "prompts": [...], "labels": [...]}  ->  {"rewards": [...]} or {"scores": [...]}

Rewards come in the order of the queries; where a server answers in an order of its own and says which query each is of,
reward.match finds its sample by the text (match.py). Everything that this form cannot say is a failure, never a score:
another number of rewards, NaN, null, an answer that belongs to no query or to several.
"""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from rlhfctl.errors import Refused, UsageError
from rlhfctl.recipe.sections import RemoteSource, Reward
from rlhfctl.rewards.match import Matcher, answers_to
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.remote_parts import DIVISIBLE, Part, divide, key_of
from rlhfctl.rewards.remote_servers import Permanent, Servers, Transient, reachable
from rlhfctl.templates.encode import ChatEncoder

PATH = "/get_reward"
MAX_BODY_BYTES = 32 * 2**20
HALVED_STATUS = 500  # this form has no room for one failed sample: the whole request is a 500


class OpenRlhfReward:
    """A source, as RemoteReward. Raises Refused where no server answers at all, UsageError as it does.

    reward: its match and match_threshold. policy: renders the prompts of `query: rendered`."""

    def __init__(self, section: RemoteSource, reward: Reward, policy: ChatEncoder | None = None) -> None:
        self.name, self.weight, self.span_weight = "remote", section.weight, 0.0
        self._section, self._match, self._threshold = section, reward.match, reward.match_threshold
        self._policy = policy
        if section.query == "rendered" and policy is None:
            raise UsageError("reward.sources: query rendered needs a policy with a chat template")
        urls = [
            url if urlsplit(url).path.strip("/") else url.rstrip("/") + PATH for url in addresses(section)
        ]
        self._servers = Servers(
            urls, key_of(section), section.timeout, section.retries, section.max_in_flight
        )
        try:
            self.silent = reachable(self._servers)
        except Refused:
            self._servers.close()
            raise
        self._threads = ThreadPoolExecutor(section.max_in_flight, thread_name_prefix="reward")

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        deadline = time.monotonic() + self._section.total_timeout
        outcomes: list[Outcome | None] = [None] * len(samples)
        queries = [""] * len(samples)
        rows: Part = []
        for place, sample in enumerate(samples):
            try:
                queries[place], prompt = self._texts(sample)
                row = [queries[place], prompt, sample["label"]]
                rows.append((place, json.dumps(row, default=str, ensure_ascii=False).encode()))
            except (TypeError, ValueError, AttributeError, RecursionError) as error:
                outcomes[place] = Outcome("error", error=f"{self.name}: the sample is no JSON: {error}")
        # No request holds one query twice: an answer that names it would be of two samples.
        parts = list(divide(rows, queries, self._section.request_size, MAX_BODY_BYTES))
        for found in self._threads.map(lambda part: self._ask(part, deadline), parts):
            for place, outcome in found.items():
                outcomes[place] = outcome
        lost = Outcome("missing", error=f"{self.name}: no answer for this sample")
        return self._trusted([outcome or lost for outcome in outcomes])

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._servers.close()

    def _texts(self, sample: dict[str, Any]) -> tuple[str, str]:
        """(query, prompt): the prompt as plain text or as the policy's template renders it, the response after it."""
        if self._section.query == "rendered":
            assert self._policy is not None
            prompt = self._policy.render(sample["messages"], add_generation_prompt=True)
        else:
            prompt = "\n".join(str(message.get("content") or "") for message in sample["messages"])
        return prompt + sample["response"], prompt

    def _ask(self, part: Part, deadline: float, retries: int | None = None) -> dict[int, Outcome]:
        rows = [json.loads(row) for _, row in part]
        body = dict(zip(("query", "prompts", "labels"), zip(*rows, strict=True), strict=True))
        try:
            answer = self._servers.post("", json.dumps(body, ensure_ascii=False).encode(), deadline, retries)
            found = self._read(answer, [row[0] for row in rows])
        except (Transient, Permanent) as error:
            divisible = error.status in DIVISIBLE or error.status == HALVED_STATUS
            if len(part) > 1 and divisible and time.monotonic() < deadline:
                # The tries were spent on the whole; its halves get one each.
                once = 0 if isinstance(error, Transient) else retries
                middle = len(part) // 2
                return self._ask(part[:middle], deadline, once) | self._ask(part[middle:], deadline, once)
            late = isinstance(error, Transient) and error.late
            failed = Outcome("timeout" if late else "error", error=f"{self.name}: {error}")
            return {place: failed for place, _ in part}
        return {place: outcome for (place, _), outcome in zip(part, found, strict=True)}

    def _read(self, answer: Any, queries: list[str]) -> list[Outcome]:
        """One outcome a query, in order. Raises Permanent for an answer that cannot be told apart."""
        given = answer.get("rewards", answer.get("scores")) if isinstance(answer, dict) else None
        if not isinstance(given, list):
            raise Permanent("the answer holds no list of rewards")
        if len(given) > len(queries) or (len(given) < len(queries) and self._match is None):
            raise Permanent(f"the answer has {len(given)} rewards for {len(queries)} queries")
        logs = answer.get("extra_logs")
        columns = {
            str(name): column
            for name, column in (logs.items() if isinstance(logs, dict) else ())
            if isinstance(column, list) and len(column) == len(given)
        }
        outcomes = [self._outcome(value, columns, place) for place, value in enumerate(given)]
        return outcomes if self._match is None else self._matched(answer, outcomes, queries)

    def _matched(self, answer: dict[str, Any], outcomes: list[Outcome], queries: list[str]) -> list[Outcome]:
        named = answer.get("query")
        if not isinstance(named, list) or len(named) != len(outcomes):
            raise Permanent(
                f"the answer does not say in `query` which texts its {len(outcomes)} rewards are of, as reward.match "
                f"{self._match} needs"
            )
        matcher = Matcher(queries, fuzzy=self._match == "fuzzy")
        places = [answers_to(matcher, text, self._match or "exact") for text in named]
        taken = [place for place in places if place is not None]
        if len(set(taken)) < len(taken):
            raise Permanent("the answer has two rewards for one query")
        absent = Outcome(
            "missing",
            metrics={"match_rate": 0.0},
            error=f"{self.name}: no reward of the answer has a `query` that is this sample's (reward.match "
            f"{self._match}); its first is {str(named[0])[:60]!r}"
            if named
            else f"{self.name}: the answer is empty",
        )
        found = [absent] * len(queries)
        for place, outcome in zip(places, outcomes, strict=True):
            if place is not None:
                outcome.metrics["match_rate"] = 1.0
                found[place] = outcome
        return found

    def _outcome(self, value: Any, columns: dict[str, list[Any]], place: int) -> Outcome:
        if value is None:
            return Outcome("missing", error=f"{self.name}: the server gave null instead of a reward")
        if not is_finite(value):
            return Outcome("error", error=f"{self.name}: a reward must be a finite number, not {value!r:.60}")
        logs = {name: float(column[place]) for name, column in columns.items() if is_finite(column[place])}
        return Outcome("ok", float(value), metrics=logs)

    def _trusted(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Below reward.match_threshold none of a batch's rewards is used: the matching itself is in doubt."""
        rates = [outcome.metrics["match_rate"] for outcome in outcomes if "match_rate" in outcome.metrics]
        if not rates or sum(rates) / len(rates) >= self._threshold:
            return outcomes
        why = next((each.error for each in outcomes if each.metrics.get("match_rate") == 0.0), "")
        said = (
            f"{self.name}: {sum(rates):g} of {len(rates)} answers were matched, reward.match_threshold is "
            f"{self._threshold:g}; {why}"
        )
        return [Outcome("error", metrics=only_rate(outcome), error=said) for outcome in outcomes]


def only_rate(outcome: Outcome) -> dict[str, float]:
    return {name: value for name, value in outcome.metrics.items() if name == "match_rate"}


def is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def addresses(section: RemoteSource) -> list[str]:
    return section.urls or [section.url or ""]
