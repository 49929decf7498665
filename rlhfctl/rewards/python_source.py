"""`kind: python`: a reward function of the user's, in a process of its own with a time limit."""

from pathlib import Path
from typing import Any

from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import PythonSource
from rlhfctl.rewards.child import Child, ChildDied, ChildTimeout
from rlhfctl.rewards.outcome import Outcome, Span


class PythonReward:
    """A source: `score` gives one outcome a sample, in order, and raises for none of them.

    What the function does wrong (raises, returns NaN or the wrong length, ends its process) is an error outcome,
    what takes longer than `timeout` seconds for one batch is a timeout outcome; after both the next batch gets a
    fresh process. Raises Refused where the file is missing.
    """

    def __init__(self, source: PythonSource) -> None:
        if not Path(source.path).is_file():
            raise Refused(f"reward function file {source.path} does not exist; check reward.sources")
        self.name, self.weight = f"{Path(source.path).stem}.{source.function}", source.weight
        self.span_weight = source.span_weight
        self._timeout = source.timeout
        self._child = Child("rlhfctl.rewards.python_child", [source.path, source.function])

    def start(self) -> None:
        """Starts the process before it is needed. Raises Refused where the function cannot be loaded."""
        try:
            self._child.start()
        except (ChildTimeout, ChildDied) as error:
            raise Refused(f"{self.name}: {error}") from None

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        if not samples:
            return []
        try:
            answers = self._child.ask(samples, self._timeout)
        except ChildTimeout as error:
            return [Outcome("timeout", error=f"{self.name}: {error}") for _ in samples]
        except ChildDied as error:
            return [Outcome("error", error=f"{self.name}: {error}") for _ in samples]
        return [self._outcome(answer) for answer in answers]

    def _outcome(self, answer: dict[str, Any]) -> Outcome:
        spans = [Span(start, end, score) for start, end, score in answer["spans"]]
        error = f"{self.name}: {answer['error']}" if answer["error"] else None
        return Outcome(answer["status"], answer["score"], spans, answer["metrics"], error)

    def close(self) -> None:
        self._child.close()
