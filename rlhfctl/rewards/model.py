"""A reward model in the trainer's process, scored through its own chat template and tokenizer."""

from typing import Any

import torch
from jinja2 import TemplateError

from rlhfctl.models.load import resolve_dtype
from rlhfctl.models.reward_model import load_reward_model
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.templates.encode import ChatEncoder

TOKENS_PER_FORWARD = 8192


class ModelReward:
    """Messages and response are rendered anew: the policy's text, ids and special tokens never reach the model."""

    def __init__(self, section: ModelSource) -> None:
        self.name = "model"
        self.weight = section.weight
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = ChatEncoder.from_path(section.path, template_kwargs=section.template_kwargs)
        self.model = load_reward_model(section.path, resolve_dtype(section.dtype, self.device), self.device)
        self.max_length = getattr(self.model.trunk.config, "max_position_embeddings", None)

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(samples)
        rows: list[list[int]] = []
        places: list[int] = []
        for place, sample in enumerate(samples):
            messages = [*sample["messages"], {"role": "assistant", "content": sample["response"]}]
            try:
                ids = self.encoder.encode_text(self.encoder.render(messages))
            except TemplateError as error:
                outcomes[place] = Outcome(
                    "error", error=f"the reward model's template refuses the messages: {error}"
                )
                continue
            if self.max_length is not None and len(ids) > self.max_length:
                outcomes[place] = Outcome(
                    "error", error=f"{len(ids)} tokens, the reward model takes {self.max_length}"
                )
                continue
            rows.append(ids)
            places.append(place)
        for place, value in zip(places, self.model.score(rows, TOKENS_PER_FORWARD), strict=True):
            finite = abs(value) < float("inf")
            outcomes[place] = (
                Outcome("ok", value) if finite else Outcome("error", error=f"the score is {value}")
            )
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        return None
