"""What a template does, seen by rendering short conversations of words that occur nowhere else.

Nothing here knows any template: every fact is read off the renders. All renders go through the bounded engine and are
kept, so that the checks may ask for the same one as often as they like.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2

from rlhfctl.templates.adapt import wrap_content
from rlhfctl.templates.bounded import Sandbox
from rlhfctl.templates.render import Message
from rlhfctl.templates.sides import Side
from rlhfctl.templates.turns import header_start

U1, A1, U2, A2, S1 = "UQONE alpha", "AQONE bravo", "UQTWO charlie", "AQTWO delta", "SQONE echo"
R1 = "RQONE xray"
REASONED = f"<think>\n{R1}\n</think>\n\n{A1}"
# <think>, </think>, [THINK], <|START_THINKING|>, <seed:think>, <|channel>thought, <|begin_of_thought|>
REASONING = re.compile(
    r"<[^<>]*think[^<>]*>|\[/?think\]|<[^<>]*(thought|reason)[^<>]*>|channel\|?>\s*(thought|analysis)", re.I
)
MARKER = re.compile(r"\s*(<[^<>\s]{1,40}>|\[/?[A-Z_|a-z]+\])")
Conversation = Sequence[Message]


def user(content: Any = U1) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any = A1) -> Message:
    return {"role": "assistant", "content": content}


def system(content: Any = S1) -> Message:
    return {"role": "system", "content": content}


class Probe:
    """One side, asked questions. `text` is None where the template refuses."""

    def __init__(self, side: Side, sandbox: Sandbox, clock: datetime, wrap: bool = False) -> None:
        """wrap: give string content as a list of one text part, for templates that want it so."""
        self.side = side
        self.clock = clock
        self.wrap = wrap
        self.tokens = visible_tokens(side)
        self._sandbox = sandbox
        self._kept: dict[str, str | jinja2.TemplateError] = {}

    def ask(self, messages: Conversation, prompt: bool = False, **options: Any) -> str | jinja2.TemplateError:
        """The render, or the error. options: tools, kwargs (added to the side's own), tokens, clock,
        source (another template), plain (another engine)."""
        key = json.dumps([list(messages), prompt, options], default=str, sort_keys=True)
        if key not in self._kept:
            self._kept[key] = self._render(messages, prompt, **options)
        return self._kept[key]

    def _render(
        self,
        messages: Conversation,
        prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
        tokens: dict[str, str | None] | None = None,
        clock: datetime | None = None,
        source: str | None = None,
        plain: bool = False,
    ) -> str | jinja2.TemplateError:
        template = source if source is not None else self.side.template
        if template is None:
            return jinja2.TemplateError("there is no template")
        try:
            return self._sandbox.render(
                template,
                wrap_content(messages) if self.wrap else messages,
                tokens if tokens is not None else self.tokens,
                add_generation_prompt=prompt,
                tools=tools,
                clock=clock or self.clock,
                kwargs={**self.side.template_kwargs, **(kwargs or {})},
                plain=plain,
            )
        except jinja2.TemplateError as error:
            return error

    def text(self, messages: Conversation, prompt: bool = False, **options: Any) -> str | None:
        answer = self.ask(messages, prompt, **options)
        return answer if isinstance(answer, str) else None

    def error(self, messages: Conversation, prompt: bool = False, **options: Any) -> str | None:
        """The error message, or None where it renders."""
        answer = self.ask(messages, prompt, **options)
        return None if isinstance(answer, str) else (answer.message or str(answer) or type(answer).__name__)

    @cached_property
    def usable(self) -> bool:
        """Whether the plainest conversation renders and keeps both texts: other findings need it."""
        return self.basic is not None and U1 in self.basic and A1 in self.basic

    @cached_property
    def basic(self) -> str | None:
        return self.text([user(), assistant()])

    @cached_property
    def prompt(self) -> str | None:
        return self.text([user()], prompt=True)

    @cached_property
    def chat(self) -> str | None:
        """Four turns; None also where one of them is missing."""
        text = self.text([user(), assistant(), user(U2), assistant(A2)])
        return text if text is not None and all(word in text for word in (U1, A1, U2, A2)) else None

    @cached_property
    def list_chat(self) -> str | None:
        """A plain conversation with content as a list of parts; None also where it is lost or printed as python."""
        turns = [user([{"type": "text", "text": U1}]), assistant([{"type": "text", "text": A1}])]
        text = self.text(turns)
        kept = text is not None and U1 in text and A1 in text and "'type'" not in text
        return text if kept else None

    @cached_property
    def bos(self) -> str | None:
        return self.side.tokens.get("bos_token") if "bos" in self.side.known else None

    @cached_property
    def eot(self) -> str | None:
        """The end-of-turn marker: declared, or what the first marker after an answer is."""
        if self.side.eot is not None or "eot" in self.side.known:
            return self.side.eot
        if self.chat is None:
            return None
        for after in (self.between_turns, self.after_final):
            found = MARKER.match(after)
            if found:
                return self._whole_marker(after[found.start(1) :], found.group(1))
        return None

    def _whole_marker(self, text: str, default: str) -> str:
        """A vocabulary, or the declared tokens, knows where a marker ends better than a pattern does."""
        declared = [token for token in self.side.tokens.values() if token]
        if self.side.tokenizer is not None:
            declared += [token.content for token in self.side.tokenizer.get_added_tokens_decoder().values()]
        return max((token for token in declared if text.startswith(token)), key=len, default=default)

    @cached_property
    def before_user(self) -> str:
        """What stands before the first user text, the BOS aside."""
        text = self.chat or self.basic or ""
        before = text[: text.find(U1)] if U1 in text else ""
        return before.removeprefix(self.bos) if self.bos else before

    @cached_property
    def between_turns(self) -> str:
        """From the first answer to the second question: terminator and user header."""
        if self.chat is None:
            return ""
        return self.chat[self.chat.index(A1) + len(A1) : self.chat.index(U2)]

    @cached_property
    def user_header(self) -> str:
        """What introduces a user turn: common to the first and the second one, without the terminator before it."""
        if self.chat is None:
            return ""
        between = self.between_turns
        known = [token for token in (self.side.eot, self.side.tokens.get("eos_token")) if token]
        return between[header_start(self.before_user, between, known) :]

    @cached_property
    def terminator(self) -> str:
        """What ends an answer that is followed by another turn."""
        return self.between_turns[: len(self.between_turns) - len(self.user_header)]

    @cached_property
    def preamble(self) -> str:
        """What stands before the first user header although nobody wrote a system message."""
        before = self.before_user
        return before[: len(before) - len(self.user_header)] if before.endswith(self.user_header) else before

    @cached_property
    def after_final(self) -> str:
        """What follows the last answer."""
        text = self.basic or ""
        return text[text.rfind(A1) + len(A1) :] if A1 in text else ""

    @cached_property
    def cue(self) -> str:
        """What follows the question in a prompt: the end of the user turn and the assistant header."""
        text = self.prompt or ""
        return text[text.rfind(U1) + len(U1) :] if U1 in text else ""

    @cached_property
    def generation_prompt(self) -> str:
        """What add_generation_prompt appends; "" where it has no effect or changes more than the end."""
        without = self.text([user()])
        if self.prompt is None or without is None or not self.prompt.startswith(without):
            return ""
        return self.prompt[len(without) :]


def visible_tokens(side: Side) -> dict[str, str | None]:
    """The tokens a template is rendered with; one that is not known gets a name that shows it in the render."""
    tokens = dict(side.tokens)
    if side.path is None:
        for name in ("bos", "eos", "pad", "unk"):
            if name not in side.known and f"{name}_token" not in tokens:
                tokens[f"{name}_token"] = f"<{name}_token>"
    return tokens
