"""A reward service that is slow, hangs, answers wrongly or dies while ppo trains: no row is lost, none is made up.

What one request may go through is in tests/rewards/test_remote.py; here it is a whole run and what it leaves.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_reward_server import INFO, Fake

from rlhfctl.errors import RunFailed
from rlhfctl.launch.same_run import compare_runs
from rlhfctl.run_dir import RunDir

Train = Callable[..., RunDir]
BATCH = 16  # samples a step; one request asks for 8 of them


class Service(Fake):
    """Scores by the response's length. fault: what happens to request number `since` (from 0) and all after it."""

    def __init__(self) -> None:
        self.fault, self.since = "none", 0
        super().__init__(lambda service, body: self.judged(body))
        self.source = (
            f"reward.sources=[{{kind: remote, url: '{self.url}', timeout: 1, total_timeout: 2, retries: 0, "
            "request_size: 8}]"
        )

    def judged(self, body: dict[str, Any]) -> Any:
        number = next(index for index, each in enumerate(self.requests) if each is body)
        fault = self.fault if number >= self.since else "none"
        rewards = [
            {"id": each["id"], "status": "ok", "score": float(len(each["response"]) % 3)}
            for each in body["samples"]
        ]
        if fault == "dies":
            return None  # hangs up; so it does with everyone from now on
        if fault == "hangs":
            time.sleep(5)
        if fault == "slow":
            time.sleep(0.2)
        if fault == "wrong":
            rewards[0]["score"] = math.nan
            rewards[1:3] = [{**rewards[1], "score": None}]  # one without a score, one left out
        return {"schema": 1, "rewards": rewards, "model": INFO}


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def quarantined(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.quarantine.read_text().splitlines()]


def test_a_slow_service_changes_nothing(train: Train, service: Service) -> None:
    whole = train("ppo", "whole", service.source)
    service.fault = "slow"
    slow = train("ppo", "slow", service.source)
    assert [each.where for each in compare_runs(whole, slow) if each.difference is not None] == []
    assert not slow.quarantine.exists()


@pytest.mark.parametrize(("fault", "status"), [("hangs", "timeout"), ("dies", "error")])
def test_one_that_is_lost_ends_the_run_and_the_run_goes_on_later(
    fault: str, status: str, train: Train, service: Service
) -> None:
    """Steps 1 and 2 are scored, step 3 is not: it is not trained, and after --resume it is, as if nothing had been."""
    whole = train("ppo", "whole", service.source, "train.save_every=1")
    service.fault, service.since = fault, 2 * BATCH // 8
    service.requests.clear()
    began = time.monotonic()
    with pytest.raises(RunFailed, match=f"{BATCH} rewards failed, 0 allowed"):
        train("ppo", "run", service.source, "train.save_every=1")
    assert time.monotonic() - began < 60
    run = RunDir(whole.path.with_name("run"))
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest.name == "step_000002"
    lost = quarantined(run)
    assert (
        len({(row["step"], row["sample"]["id"], row["sample"]["response"]) for row in lost})
        <= len(lost)
        == BATCH
    )
    assert {(row["step"], row["status"]) for row in lost} == {(3, status)}
    service.fault = "none"
    train("ppo", "run", service.source, "train.save_every=1", resume=True)
    assert [each.where for each in compare_runs(whole, run) if each.difference is not None] == []
    assert quarantined(run) == []


def test_wrong_answers_are_no_scores(train: Train, service: Service) -> None:
    """Of every 8 samples 3 have no score: the others are trained on, and nothing stands in for what is missing."""
    service.fault = "wrong"
    run = train("ppo", "run", service.source, "reward.max_failures=1000", "algorithm.advantage=reinforce")
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert len(rows) == 4
    lost = quarantined(run)
    assert len(lost) == 4 * BATCH * 3 // 8
    assert {row["status"] for row in lost} == {"error", "missing"}
    for row in rows:
        assert row["reward/failures"] == sum(1 for each in lost if each["step"] <= row["step"])
        assert all(math.isfinite(value) for value in row.values())
        assert 0 <= row["reward/mean"] <= 2
