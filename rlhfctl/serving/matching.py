"""Rows of a data file, found again by the text of their prompt: for clients that send texts and nothing else.

Opt-in (--data, --match). A prompt that finds no row, or more than one, has no score; the share that finds one is logged
in /metrics. What may differ between the two texts is in rewards/match.py: never a word, a number or a sign.
"""

import threading
from typing import Any

from rlhfctl.data.load import load_samples
from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import DataSource
from rlhfctl.rewards.match import EXACT, Matcher, Mode
from rlhfctl.rewards.python_child import prompt_text


class Rows:
    """Thread-safe."""

    def __init__(self, path: str, mode: Mode) -> None:
        """Raises Refused where the file cannot be read or holds no row."""
        self._samples = load_samples([DataSource(path=path)], 0).samples
        if not self._samples:
            raise Refused(f"{path} holds no rows to match prompts with")
        texts = [prompt_text({"messages": sample.prompt()}) for sample in self._samples]
        self._matcher = Matcher(texts, fuzzy=mode == "fuzzy")
        self._mode = mode
        self._lock = threading.Lock()

    def complete(self, sample: dict[str, Any], prompt: str) -> str | None:
        """Gives the sample its row's messages, metadata, and label where it came without one (OpenRLHF sends "" where
        it has none). The stage of the match, None where there was none."""
        with self._lock:
            found = self._matcher.find(prompt)
        if found is None or (self._mode == "exact" and found.stage not in EXACT):
            return None
        row = self._samples[found.index]
        sample["messages"], sample["metadata"] = row.prompt(), row.metadata
        if sample["label"] in (None, ""):
            sample["label"] = row.label
        return found.stage
