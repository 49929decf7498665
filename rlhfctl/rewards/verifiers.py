"""`kind: verifier`: rules that read the answer out of a response."""

from collections.abc import Callable
from typing import Any

from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.chain import chain_answer
from rlhfctl.rewards.math_answer import MathAnswer
from rlhfctl.rewards.ncot import ncot_answer
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.program import ProgramAnswer

Verifier = Callable[[dict[str, Any], VerifierSource], Outcome]

VERIFIERS: dict[str, Callable[[], Verifier | ProgramAnswer]] = {
    "chain_answer": lambda: chain_answer,
    "math_answer": MathAnswer,
    "ncot_answer": lambda: ncot_answer,
    "program_answer": ProgramAnswer,
}


class VerifierReward:
    """A source: `score` gives one outcome a sample, in order, and raises for none of them."""

    def __init__(self, source: VerifierSource) -> None:
        self.name: str = source.name
        self.weight, self._source = source.weight, source
        self.span_weight = source.span_weight
        self._verify = VERIFIERS[source.name]()

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        if isinstance(self._verify, ProgramAnswer):
            return self._verify.score(samples, self._source)
        return [self._score(self._verify, sample) for sample in samples]

    def _score(self, verify: Verifier, sample: dict[str, Any]) -> Outcome:
        if sample["label"] is None:
            return Outcome("missing", error=f"{self.name}: the row has no label")
        try:
            return verify(sample, self._source)
        except Exception as error:  # an answer that a rule trips over must not end the run, nor become a zero
            return Outcome("error", error=f"{self.name}: {type(error).__name__}: {error}")

    def close(self) -> None:
        if isinstance(self._verify, MathAnswer | ProgramAnswer):
            self._verify.close()
