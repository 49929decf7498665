"""Samples -> token ids and loss masks, and an account of what was left out and why."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from rlhfctl.collector import resting
from rlhfctl.data.samples import Sample
from rlhfctl.templates.encode import ChatEncoder

TOO_LONG = "too long"
NOTHING_TRAINED = "no trained token"
NO_PROMPT = "no prompt"
TEMPLATE = "refused by the chat template"
TOKENIZER = "refused by the tokenizer"
TOOLS = "unreadable tools"

SHOWN = 5  # examples kept for each reason


@dataclass(slots=True)
class SftRow:
    """ids and mask have one length; mask is 1 where the token carries loss (the stop token included)."""

    id: str
    ids: list[int]
    mask: list[int]


@dataclass(slots=True)
class PromptRow:
    """ids end where the policy starts to write."""

    sample: Sample
    ids: list[int]


@dataclass(slots=True)
class DropReport:
    """Rows left out, counted by reason, with the first few of each as "file:row: detail"."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, sample: Sample, detail: str) -> None:
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN:
            shown.append(f"{sample.origin or sample.id}: {detail}")

    def sentence(self) -> str:
        """For the run's log: "kept 1980 of 2000 rows; 20 too long (data.jsonl:7: 1100 tokens, ...)"."""
        total = self.kept + sum(self.dropped.values())
        parts = [f"kept {self.kept} of {total} rows"]
        parts += [f"{n} {reason} ({', '.join(self.examples[reason])})" for reason, n in self.dropped.items()]
        return "; ".join(parts)


class BadTools(ValueError):
    """A row's `tools` column holds something else than tool definitions."""


def tools_of(sample: Sample) -> list[dict[str, Any]] | None:
    """The row's `tools` column as templates expect it: a list of {"type": "function", "function": {...}}.

    It may be JSON text, and the definitions may be bare. None where there are no tools. Raises BadTools.
    """
    tools = sample.metadata.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise BadTools("tools is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadTools("tools is not a list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def refuser(error: Exception) -> str:
    """What could not take a row; anything else is a bug and is raised again."""
    if isinstance(error, TemplateError):
        return TEMPLATE
    if isinstance(error, BadTools):
        return TOOLS
    if type(error) is Exception:  # all that tokenizers raises, e.g. a character outside a closed vocabulary
        return TOKENIZER
    raise error


@resting()
def encode_sft(
    samples: list[Sample], encoder: ChatEncoder, max_length: int, train_on: str = "all_assistant"
) -> tuple[list[SftRow], DropReport]:
    """Whole conversations. Rows of more than `max_length` tokens are dropped: cutting one would train an answer
    without its end, or without its stop token."""
    rows: list[SftRow] = []
    report = DropReport()
    for sample in samples:
        try:
            ids, mask = encoder.encode_conversation(sample.conversation(), train_on, tools_of(sample))
        except Exception as error:
            report.drop(refuser(error), sample, str(error))
            continue
        if len(ids) > max_length:
            report.drop(TOO_LONG, sample, f"{len(ids)} tokens")
        elif not any(mask):
            report.drop(NOTHING_TRAINED, sample, "no assistant turn, or none of a weight but 0")
        else:
            rows.append(SftRow(sample.id, ids, mask))
    report.kept = len(rows)
    return rows, report


@resting()
def encode_prompts(
    samples: list[Sample], encoder: ChatEncoder, max_prompt_length: int | None
) -> tuple[list[PromptRow], DropReport]:
    """What the policy answers: the messages without the trailing assistant turns, with the generation prompt.
    Prompts of more than `max_prompt_length` tokens are dropped; None: no limit."""
    rows: list[PromptRow] = []
    report = DropReport()
    for sample in samples:
        prompt = sample.prompt()
        if not prompt:
            report.drop(NO_PROMPT, sample, "only assistant turns")
            continue
        try:
            ids = encoder.encode_prompt(prompt, tools_of(sample))
        except Exception as error:
            report.drop(refuser(error), sample, str(error))
            continue
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            report.drop(TOO_LONG, sample, f"{len(ids)} tokens")
        else:
            rows.append(PromptRow(sample, ids))
    report.kept = len(rows)
    return rows, report
