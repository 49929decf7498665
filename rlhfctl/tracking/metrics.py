"""metrics.jsonl and samples.jsonl: one JSON object a line, flushed as it is written."""

import json
import math
from pathlib import Path
from typing import Any

SIGNIFICANT = 9  # digits kept: enough to tell two float32 runs apart


def rounded(value: Any) -> Any:
    """Floats to nine significant digits; NaN and infinities, which JSON has not, to null."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    line = json.dumps(rounded(record), ensure_ascii=False) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        error.filename = str(path)  # a write that fails does not say of which file
        raise
