"""A reward model in the trainer's process, scored through its own chat template and tokenizer."""

import hashlib
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from rlhfctl.algorithms.redistribution import attended
from rlhfctl.architectures import longest_row
from rlhfctl.errors import Refused
from rlhfctl.models.attention_read import scores_and_attention
from rlhfctl.models.load import config_of, resolve_dtype
from rlhfctl.models.reward_model import RewardModel, last_read, load_reward_model
from rlhfctl.models.tokenizer import load_encoder
from rlhfctl.recipe.sections import ModelSource, Template
from rlhfctl.rewards.outcome import Outcome, Span
from rlhfctl.rewards.spans import step_spans, token_spans
from rlhfctl.serving.protocol import Granularity
from rlhfctl.templates.bridge import Bridge, Bridged, BridgeOptions, TooLong
from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.places import (
    NotFound,
    answer,
    response_places,
    split_steps,
    step_places,
    token_offsets,
)

TOKENS_PER_FORWARD = 8192


class ModelReward:
    """Messages and response are rendered anew: the policy's text, ids and special tokens never reach the model."""

    def __init__(
        self,
        section: ModelSource,
        policy: ChatEncoder | None = None,
        template: Template | None = None,
        granularity: Granularity = "sequence",
        redistribution: str = "none",
    ) -> None:
        """policy: opens the reasoning block that its prompts open. template: what may be done to messages.

        granularity: of the spans that a source with span_weight must give. redistribution, of a model that reads the
        last token: its spans are what each token adds (`difference`: it is read at every token), or the score in
        proportion to what its last layer attends to (`attention`). Raises Refused where the
        model cannot give them."""
        self.name = "model"
        self.weight, self.span_weight = section.weight, section.span_weight
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = load_encoder(section.path, template_kwargs=section.template_kwargs)
        self.model = load_reward_model(section.path, resolve_dtype(section.dtype, self.device), self.device)
        self.spreads = redistribution != "none" and self.model.read == "last_token"
        self.differences = self.spreads and redistribution == "difference"
        self.step_reward = section.step_reward if self.model.read == "step_end" else None
        if self.spreads and not isinstance(self.model, RewardModel):
            raise Refused(
                f"{section.path} is an encoder: it has no score of a beginning, so no redistribution"
            )
        if section.span_weight and granularity not in self.granularities:
            raise Refused(no_spans(section.path, self.model.read, granularity))
        options = BridgeOptions(
            fold_system=template is not None and template.fold_system,
            merge_roles=template is not None and template.merge_roles,
            max_length=longest_row(config_of(self.model.trunk).to_dict()),
        )
        self.bridge = Bridge(policy, encoder, options)

    def score(self, samples: list[dict[str, Any]]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(samples)
        rows: list[list[int]] = []
        places: list[int] = []
        asked: list[tuple[Bridged, str]] = []
        read: list[list[int]] = []
        for place, sample in enumerate(samples):
            try:
                bridged = self.bridge.encode(sample["messages"], sample["response"])
                read.append(self.places(bridged, sample["response"]))
            except TemplateError as error:
                outcomes[place] = Outcome(
                    "error", error=f"the reward model's template refuses the messages: {error}"
                )
                continue
            except TooLong as error:
                outcomes[place] = Outcome("error", error=str(error))
                continue
            except (
                Exception
            ) as error:  # messages of a shape it never met; the tokenizer raises bare Exception
                outcomes[place] = Outcome(
                    "error",
                    error=f"the reward model cannot read the messages: {type(error).__name__}: {error}",
                )
                continue
            rows.append(bridged.ids)
            places.append(place)
            asked.append((bridged, sample["response"]))
        if self.differences:
            assert isinstance(self.model, RewardModel)
            values = self.model.at(rows, read, TOKENS_PER_FORWARD)
            scores = [(value[-1] - self.model.mean) / self.model.std for value in values]
        elif self.spreads:
            assert isinstance(self.model, RewardModel)
            reads = [last_read(row, self.model.pad) for row in rows]
            found, attention = scores_and_attention(self.model, rows, reads, TOKENS_PER_FORWARD)
            scores = [(value - self.model.mean) / self.model.std for value in found]
            values = [
                self.attended(places, heads, score)
                for places, heads, score in zip(read, attention, scores, strict=True)
            ]
        elif self.model.read == "last_token":
            values = [[score] for score in self.model.score(rows, TOKENS_PER_FORWARD)]
            scores = [value[0] for value in values]
        else:
            assert isinstance(self.model, RewardModel)  # an encoder gives one score a sequence
            values = self.model.at(rows, read, TOKENS_PER_FORWARD)
            scores = [self.model.joined(value) for value in values]
        for index, place in enumerate(places):
            bridged, response = asked[index]
            found_at = [scores[index], *values[index]]  # the lowest of several is a number beside NaN
            if all(abs(value) < float("inf") for value in found_at):
                text = hashlib.sha256(bridged.text.encode()).hexdigest()
                spans = self.spans(bridged, response, read[index], values[index])
                outcomes[place] = Outcome("ok", scores[index], spans, text_sha256=text)
            else:
                worst = next(value for value in found_at if not abs(value) < float("inf"))
                outcomes[place] = Outcome("error", error=f"the score is {worst}")
        return [outcome for outcome in outcomes if outcome is not None]

    @property
    def granularities(self) -> list[Granularity]:
        """What the spans of its outcomes are about, beside the whole response."""
        finer: dict[str, list[Granularity]] = {"step_end": ["step"], "token_sum": ["token"]}
        return ["sequence", *finer.get(self.model.read, [])]

    def spans(self, bridged: Bridged, response: str, places: list[int], values: list[float]) -> list[Span]:
        """Of steps: the score is the lowest. Of tokens: the score is the sum; the mean is taken off the last one."""
        mean, std = self.model.mean, self.model.std
        if self.model.read != "last_token" and not response.strip():
            assert isinstance(self.model, RewardModel)
            return [Span(0, len(response), self.model.joined(values))]
        if self.differences and len(values) < 2:
            return []
        if self.differences:
            steps = zip(values[1:], values[:-1], strict=True)
            added = [(after - before) / std for after, before in steps]
            return token_spans(self.bridge.rm, bridged, response, places[1:], added)
        if self.spreads:
            return token_spans(self.bridge.rm, bridged, response, places, values) if values else []
        if self.model.read == "step_end":
            scores = [(value - mean) / std for value in values]
            return step_spans(response, self.model.separator, scores)
        if self.model.read == "token_sum" and values:
            scores = [*(value / std for value in values[:-1]), (values[-1] - mean) / std]
            return token_spans(self.bridge.rm, bridged, response, places, scores)
        return []

    def places(self, bridged: Bridged, response: str) -> list[int]:
        """The token indices that the model's score is read at, for models that read more than the last token."""
        if self.differences:
            last = last_read(bridged.ids, self.model.pad)
            try:
                places = response_places(self.bridge.rm, bridged)
            except NotFound:  # an empty response, or one that the template rewrites: its score stays whole
                return [last]
            return [places[0] - 1, *(place for place in places if place <= last)] if places[0] else [last]
        if self.spreads:
            last = last_read(bridged.ids, self.model.pad)
            try:
                return [place for place in response_places(self.bridge.rm, bridged) if place <= last]
            except NotFound:
                return []
        if self.model.read == "last_token":
            return []
        last = last_read(bridged.ids, self.model.pad)
        if wrote_nothing(bridged):
            behind = self.behind_prompt(bridged) if self.model.read == "token_sum" else []
            return [place for place in behind if place <= last] or [last]
        if self.model.read == "token_sum":
            return [place for place in response_places(self.bridge.rm, bridged) if place <= last]
        # Of a response of blanks behind an opened reasoning block the steps are those of the block.
        written = response if response.strip() else answer(bridged)
        before = len(answer(bridged)) - len(written)
        return step_places(self.bridge.rm, bridged, split_steps(written, self.model.separator), before)

    def behind_prompt(self, bridged: Bridged) -> list[int]:
        """Of an empty response: the tokens from the end of the generation prompt on, as of others from their first."""
        prompt = self.bridge.rm.render(bridged.messages[:-1], add_generation_prompt=True)
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, bridged.text, strict=False))
        start = len(list(shared))
        offsets = token_offsets(bridged)
        behind = sum(end <= start for _, end in offsets) - bridged.dropped
        return list(range(behind, len(bridged.ids)))

    def attended(self, places: list[int], heads: Tensor, score: float) -> list[float]:
        """The score over the response tokens at `places`; [] where there are none, or none is attended to."""
        own = heads[:, places]
        return attended(own, score).tolist() if places and bool(own.sum() > 0) else []

    def close(self) -> None:
        return None


def wrote_nothing(bridged: Bridged) -> bool:
    """Whether the response is empty, or whitespace, which a template may trim and which stands elsewhere too."""
    return not answer(bridged).strip()


def no_spans(path: str, read: str, granularity: str) -> str:
    """Why a reward model cannot be a source of spans; preflight says the same."""
    gives = {"step_end": "scores of steps", "token_sum": "scores of tokens"}.get(read, "one score a response")
    return f"reward model {path} gives {gives}, its source has a span_weight and reward.granularity is {granularity}"
