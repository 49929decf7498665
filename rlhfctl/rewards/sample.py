"""The structured row that travels to every reward source: never a bare string."""

from typing import Any

from rlhfctl.data.samples import Sample


def reward_sample(sample: Sample, response: str) -> dict[str, Any]:
    """messages: the prompt side alone; response: the text to be scored."""
    return {
        "id": sample.id,
        "messages": sample.prompt(),
        "response": response,
        "label": sample.label,
        "metadata": sample.metadata,
    }
