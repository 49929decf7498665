"""What /metrics shows, in the form of Prometheus."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """A registry of its own, so that two services in one process do not add up."""

    MEDIA_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("rlhfctl_requests", "requests answered", ["path", "code"], registry=registry)
        self.samples = Counter("rlhfctl_samples", "samples by outcome", ["status"], registry=registry)
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

    def text(self) -> bytes:
        return generate_latest(self._registry)
