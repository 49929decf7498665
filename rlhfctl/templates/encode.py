"""Conversations to token ids, prompts and loss masks, through the chat template a model was published with."""

import hashlib
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from rlhfctl.errors import TemplateMismatch, UsageError
from rlhfctl.templates.render import Message, Span, render
from rlhfctl.templates.sanitize import Sanitizer
from rlhfctl.templates.sides import Side, load_side, special_strings
from rlhfctl.templates.turns import assistant_spans, turn_ends

__all__ = ["ChatEncoder", "Side", "load_side"]

TrainOn = Literal["all_assistant", "last_assistant"]
Tools = list[dict[str, Any]] | None  # what the template's `tools` variable holds


class ChatEncoder:
    """A template, its special tokens and a tokenizer.

    tokens: {"bos_token": "<s>", ...} (the `special_tokens_map` of a transformers tokenizer fits; its
    `backend_tokenizer` fits as `tokenizer`). stop_ids: further ids that end a response, e.g. generation_config's list;
    eos and the template's end-of-turn token are always among them. Raises jinja2.TemplateError from every method that
    renders, when the template refuses the messages.
    """

    def __init__(
        self,
        template: str,
        tokens: dict[str, str | None],
        tokenizer: Tokenizer,
        template_kwargs: dict[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
        pad_id: int | None = None,
        clock: datetime | None = None,
    ) -> None:
        self.template = template
        self.tokens = dict(tokens)
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.clock = clock
        self.sha256 = hashlib.sha256(template.encode()).hexdigest()
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.markers = special_strings(tokenizer)
        self.ends = turn_ends(self._render, self.markers, self.tokens.get("eos_token"))
        self.eos_id = self._id(self.tokens.get("eos_token"))
        self.pad_id = pad_id if pad_id is not None else self._id(self.tokens.get("pad_token"))
        stops = [self.eos_id, *(self._id(token) for token in self.ends.stops), *stop_ids]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in stops if i is not None))

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        chat_template: str | Path | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> "ChatEncoder":
        """Raises TemplateMismatch where there is no template, UsageError where there is no tokenizer.json."""
        return cls.from_side(load_side(path, chat_template, template_kwargs))

    @classmethod
    def from_side(cls, side: Side, clock: datetime | None = None) -> "ChatEncoder":
        if side.template is None:
            raise TemplateMismatch(
                f"{side.name} {side.problem or 'has no chat template'}: give one as a .jinja file"
            )
        if side.tokenizer is None:
            raise UsageError(f"{side.name} has no tokenizer.json")
        stops = side.generation_eos or ()
        return cls(side.template, side.tokens, side.tokenizer, side.template_kwargs, stops, clock=clock)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, added ones included (the embedding may have more rows)."""
        return int(self.tokenizer.get_vocab_size())

    @cached_property
    def sanitizer(self) -> Sanitizer:
        """Made when content first spells a control token: copying a tokenizer takes a second."""
        return Sanitizer(self.tokenizer)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.tokenizer.token_to_id(token)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self.render(messages, add_generation_prompt)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Tools = None,
    ) -> str:
        """As transformers' apply_chat_template(tokenize=False)."""
        return render(
            self.template,
            messages,
            self.tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            clock=self.clock,
            kwargs=self.template_kwargs,
        )

    def encode_text(self, text: str) -> list[int]:
        """Ids of a rendered text; nothing is added at either end."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Ids up to where the policy starts to write."""
        return self.encode_text(self.render(messages, add_generation_prompt=True, tools=tools))

    def encode_conversation(
        self, messages: Sequence[Message], train_on: TrainOn | str = "all_assistant", tools: Tools = None
    ) -> tuple[list[int], list[int]]:
        """Ids of the whole conversation, and a mask that is 1 on what the policy has to produce: every token of an
        assistant turn from the end of its prompt to its stop token. A token that holds characters of both the prompt
        and the response counts as response."""
        text, spans = self.spans(messages, train_on, tools)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return list(encoding.ids), mask_of(encoding.offsets, spans)

    def spans(
        self, messages: Sequence[Message], train_on: TrainOn | str = "all_assistant", tools: Tools = None
    ) -> tuple[str, list[Span]]:
        """The rendered conversation and the character spans that carry loss. An assistant message whose `weight` or
        `loss_weight` is 0 is read, but carries none."""
        chosen = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if train_on == "last_assistant":
            chosen = chosen[-1:]
        chosen = [i for i in chosen if all(messages[i].get(key) != 0 for key in ("weight", "loss_weight"))]
        return assistant_spans(partial(self.render, tools=tools), messages, self.ends, self.markers, chosen)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a response: trailing stop and pad ids are cut, every other special token stays as text."""
        cut = {*self.stop_ids} if self.pad_id is None else {*self.stop_ids, self.pad_id}
        end = len(ids)
        while end and ids[end - 1] in cut:
            end -= 1
        return str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=False))


def mask_of(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token with a character inside a span. Characters that a tokenizer leaves out of its offsets (trimmed
    spaces, whitespace swallowed by a marker) belong to the token after them."""
    mask = [0] * len(offsets)
    place = reached = 0
    for index, (start, end) in enumerate(offsets):
        start = min(start, reached)
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        if place < len(spans):
            low, high = spans[place]
            mask[index] = int(start < high and end > low) if end > start else int(low <= start < high)
        reached = max(reached, end)
    return mask
