"""What /metrics shows, in the form of Prometheus."""

from typing import get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from rlhfctl.rewards.outcome import Status

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """A registry of its own, so that two services in one process do not add up."""

    MEDIA_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("rlhfctl_requests", "requests answered", ["path", "code"], registry=registry)
        self.samples = Counter("rlhfctl_samples", "samples by outcome", ["status"], registry=registry)
        # Found once: to look a label up costs as much as to read a small request.
        self.outcomes = {status: self.samples.labels(status) for status in get_args(Status)}
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self.matches = Counter(
            "rlhfctl_matches", "prompts found again in the data, by stage", ["stage"], registry=registry
        )
        self.seconds = Histogram(
            "rlhfctl_request_seconds", "time to answer", ["path"], registry=registry, buckets=SECONDS
        )
        self.batch = Histogram(
            "rlhfctl_batch_samples", "samples scored together", registry=registry, buckets=SIZES
        )
        self.waiting = Gauge("rlhfctl_waiting_samples", "samples not yet scored", registry=registry)

    def answered(self, path: str, code: int, seconds: float) -> None:
        found = self._answered.get((path, code))
        if found is None:
            found = self.requests.labels(path, str(code)), self.seconds.labels(path)
            self._answered[path, code] = found
        found[0].inc()
        found[1].observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
