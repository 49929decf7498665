"""Answers that are programs, as ReFT's P-CoT: `def solution():` whose result is the answer. They never run in here."""

import os
from typing import Any

from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.child import Child, ChildDied, ChildTimeout
from rlhfctl.rewards.ncot import equal, judged, reference_number
from rlhfctl.rewards.outcome import Outcome

START = "def solution():\n"
CPU_SECONDS, SECONDS = 2, 10  # of one program: of a processor, on the clock
LONGEST = 20_000  # characters of a program
JOBS = max(2, min(8, os.cpu_count() or 2))


def program_of(response: str) -> str | None:
    """The program that a response is: from its last `def solution():`, or the body of one that the prompt began, up to
    the first blank line. None for nothing, or for more than anyone would read."""
    start = response.rfind(START)
    code = response[start:] if start >= 0 else START + response.lstrip("\n")
    code = code.split("\n\n", 1)[0]
    return code + "\n" if code.strip() != START.strip() and len(code) <= LONGEST else None


class Programs:
    """Runs programs in a warm process of its own (program_child.py): no network, no files, no processes, 256 MiB, 2 s
    of CPU, 10 s on the clock. Whatever a program does, its result is a number or None."""

    def __init__(self, cpu_seconds: int = CPU_SECONDS, seconds: int = SECONDS) -> None:
        self.seconds = seconds
        arguments = [str(number) for number in (JOBS, cpu_seconds, seconds)]
        self._child = Child("rlhfctl.rewards.program_child", arguments)

    def run(self, responses: list[str]) -> list[tuple[float | None, str]]:
        """(value, how it ended) of each. Raises ChildTimeout or ChildDied where the process itself fails."""
        programs = [program_of(response) for response in responses]
        asked = [program for program in programs if program is not None]
        rounds = -(-len(asked) // JOBS)
        found = iter(self._child.ask(asked, self.seconds * (rounds + 2)) if asked else [])
        return [(None, "none") if program is None else tuple(next(found)) for program in programs]

    def close(self) -> None:
        self._child.close()


class ProgramAnswer:
    """Verifier of a batch: a program that gives no number is unparsable, whatever kept it from one."""

    def __init__(self, programs: Programs | None = None) -> None:
        self._programs = programs or Programs()

    def score(self, samples: list[dict[str, Any]], source: VerifierSource) -> list[Outcome]:
        """Metrics: correct, parsable, timed_out (of those stopped by the clock)."""
        try:
            found = self._programs.run([sample["response"] for sample in samples])
        except (ChildTimeout, ChildDied) as error:
            return [Outcome("error", error=f"program_answer: the process that runs programs {error}")] * len(
                samples
            )
        return [
            self._judge(sample["label"], value, how, source)
            for sample, (value, how) in zip(samples, found, strict=True)
        ]

    def _judge(self, label: Any, value: float | None, how: str, source: VerifierSource) -> Outcome:
        if label is None:
            return Outcome("missing", error="program_answer: the row has no label")
        reference = reference_number(label)
        if reference is None:
            return Outcome("error", error=f"program_answer: the label must be a number, not {label!r}")
        correct = value is not None and equal(value, reference)
        return judged(source, value is not None, correct, {"timed_out": float(how == "late")})

    def close(self) -> None:
        self._programs.close()
