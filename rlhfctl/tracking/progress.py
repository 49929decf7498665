"""What a person sees while a run goes on: one live line on a terminal, plain lines otherwise."""

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from rlhfctl.streams import write

SHOWN = {
    "loss/sft": "loss",
    "loss/rm": "loss",
    "loss/policy": "loss",
    "loss/value_fit": "loss",
    "reward/mean": "reward",
    "kl/reference": "kl",
    "rm/accuracy": "accuracy",
    "eval/accuracy": "eval",
    "eval/loss": "eval loss",
}
FOLLOWED = ("reward/mean", "rm/accuracy", "loss/sft", "loss/policy")  # the first that a task has
BLOCKS = "▁▂▃▄▅▆▇█"
COURSE = 24  # newest records in the sparkline


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}m"
    return f"{seconds / 3600:.1f}h"


def number(value: float) -> str:
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"


def sparkline(values: Sequence[float]) -> str:
    """The course of some numbers in one row of blocks, lowest to highest."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    steps = len(BLOCKS) - 1
    return "".join(BLOCKS[int((value - low) / (high - low or 1.0) * steps + 0.5)] for value in values)


class Progress:
    """interactive: rewrite one line; otherwise one line per logged step. course: with a sparkline of the reward (of the
    loss where there is no reward) in the live line."""

    live: ClassVar["Progress | None"] = None  # whose line the terminal's cursor stands behind

    def __init__(
        self, total: int, start: int, say: "object", interactive: bool | None = None, course: bool = False
    ) -> None:
        self.total = total
        self.first = start
        self.say = say
        self.interactive = sys.stderr.isatty() if interactive is None else interactive
        self.began = time.monotonic()
        self.course: deque[float] | None = deque(maxlen=COURSE) if course else None

    def line(self, step: int, metrics: dict[str, float]) -> str:
        parts = [f"step {step}/{self.total}"]
        parts += [f"{label} {number(metrics[name])}" for name, label in SHOWN.items() if name in metrics]
        done = step - self.first
        if done > 0:
            each = (time.monotonic() - self.began) / done
            parts.append(f"{each:.2f} s/step" if each < 100 else f"{each:.0f} s/step")
            if step < self.total:
                parts.append(f"eta {duration(each * (self.total - step))}")
        return "  ".join(parts)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        text = self.line(step, metrics)
        if self.interactive:
            text = self.with_course(text, metrics)
            # A line that wraps cannot be rewritten.
            shown = text[: max(20, shutil.get_terminal_size().columns - 1)]
            write(sys.stderr, f"\r{shown}\x1b[K")
            Progress.live = self
        else:
            self.say(text)  # type: ignore[operator]

    def with_course(self, text: str, metrics: dict[str, float]) -> str:
        """The line with the sparkline behind the step, where a narrow terminal still shows it."""
        if self.course is None:
            return text
        value = next((metrics[name] for name in FOLLOWED if name in metrics), None)
        if value is not None and math.isfinite(value):
            self.course.append(value)
        first, gap, rest = text.partition("  ")
        return f"{first}  {sparkline(self.course)}{gap}{rest}" if self.course else text

    def close(self) -> None:
        if Progress.live is self:
            end_live_line()


def end_live_line() -> None:
    """Before anything else goes to the terminal: the line that was rewritten stays as it is, and a new one begins."""
    if Progress.live is not None:
        Progress.live = None
        write(sys.stderr, "\n")
