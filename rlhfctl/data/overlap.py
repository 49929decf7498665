"""Evaluation prompts that were trained on: they measure memory, so they are counted."""

import json
from collections.abc import Sequence
from typing import Any

from rlhfctl.data.load import load_samples
from rlhfctl.data.samples import Sample
from rlhfctl.errors import RlhfctlError
from rlhfctl.recipe.sections import DataSource


def key(sample: Sample) -> str:
    """The conversation up to the answer, system message aside: a recipe may have put one before either set."""
    return turns(sample.prompt())


def turns(messages: Sequence[dict[str, Any]]) -> str:
    """Messages as one text that is the same for the same ones, those of the system aside."""
    said: list[Any] = [
        (message.get("role"), message.get("content"))
        for message in messages
        if message.get("role") != "system"
    ]
    return json.dumps(said, sort_keys=True, default=str)


def shared_prompts(samples: Sequence[Sample], others: Sequence[Sample]) -> int:
    """How many of the samples have a prompt that one of the others has."""
    seen = {key(sample) for sample in others}
    return sum(key(sample) in seen for sample in samples)


def overlapping(samples: Sequence[Sample], trained_on: Sequence[DataSource]) -> int:
    """How many of the samples have a prompt that the training data has. A file that is gone or closed is left out."""
    seen: set[str] = set()
    for source in trained_on:
        for judged in (False, True):
            try:
                seen.update(key(sample) for sample in load_samples([source], 10**9, judged).samples)
                break
            except (RlhfctlError, PermissionError):
                continue
    return sum(key(sample) in seen for sample in samples)
