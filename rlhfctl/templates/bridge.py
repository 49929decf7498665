"""From the policy's conversation to what the reward model reads, through the reward model's own template.

1. the response is cut at the policy's first stop id and decoded
2. a reasoning block that the policy's prompt opened is opened again in the response
3. messages are adapted to what the reward model's template takes
4. they are rendered and encoded as the reward model was trained
5. what is too long is cut at the left of the prompt, never at the scored end
6. the policy's own ids stay as they are: nothing here gives ids back to it
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jinja2 import TemplateError
from tokenizers import Encoding

from rlhfctl.errors import UsageError
from rlhfctl.templates.adapt import (
    drop_tools,
    fold_system,
    join_content,
    merge_roles,
    set_system,
    wrap_content,
)
from rlhfctl.templates.encode import ChatEncoder, mask_of
from rlhfctl.templates.probe import A1, REASONING, S1, U1, U2, assistant, system, user
from rlhfctl.templates.render import Message, Span
from rlhfctl.templates.sanitize import forged_spans

CLOSED = re.compile(r"<think>.*?</think>\s*", re.S)


@dataclass(frozen=True, slots=True)
class BridgeOptions:
    """fold_system, merge_roles: allowed where the reward model's template needs them. reasoning: keep it in the
    response, strip it, or pass it as the message's reasoning_content. system: inherit (what the data has) | none | the
    text itself. bos: template | force | none. end: auto (a reward token if the vocabulary has one) | template | eos |
    a token. max_length: in tokens of the reward model; None: no limit."""

    fold_system: bool = False
    merge_roles: bool = False
    drop_tools: bool = False
    reasoning: Literal["keep", "strip", "content-field"] = "keep"
    system: str = "inherit"
    bos: Literal["template", "force", "none"] = "template"
    end: str = "auto"
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class Bridged:
    """text: what the reward model's template rendered, byte for byte. ids: what it reads; `dropped` tokens of the
    prompt were cut off. notes: what was done to the messages. encoding: of the text, where `ids` are its ids. offsets:
    the characters of each id where content spells control tokens, which are read as text. after: what the template
    writes behind a last answer; None: not known."""

    text: str
    ids: list[int]
    messages: list[Message] = field(repr=False)
    notes: tuple[str, ...] = ()
    dropped: int = 0
    encoding: Encoding | None = field(default=None, repr=False)
    after: str | None = None
    offsets: list[Span] | None = field(default=None, repr=False)


class TooLong(Exception):
    """The response alone is longer than the reward model's limit: the sample has no score."""


class Bridge:
    """What the reward model's template needs is found out once, here, by rendering."""

    def __init__(
        self, policy: ChatEncoder | None, rm: ChatEncoder, options: BridgeOptions | None = None
    ) -> None:
        self.policy = policy
        self.rm = rm
        self.options = options or BridgeOptions()
        self.opened = opened_reasoning(policy) if policy is not None else ""
        takes_text = self._holds([user(), assistant()], U1)
        self.wraps = not takes_text and self._holds(wrap_content([user(), assistant()]), U1)
        self.joins = takes_text and not self._takes_lists()
        self.folds = self.options.fold_system and not self._holds([system(), user(), assistant()], S1)
        self.merges = self.options.merge_roles and not self._holds([user(), user(U2), assistant()], U1)
        self.after = self._after()
        self.dangling = self._dangling()
        self.end_id = self._end_id()
        self.bos_id = rm.tokenizer.token_to_id(rm.tokens.get("bos_token") or "")

    def response_text(self, ids: Sequence[int]) -> str:
        """Step 1: text up to the policy's first stop id; special tokens inside it stay as text."""
        if self.policy is None:
            raise UsageError("a bridge without a policy takes responses as text")
        stops = set(self.policy.stop_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return self.policy.decode_response(ids[:end])

    def adapt(
        self, messages: Sequence[Message], response: str | Sequence[int]
    ) -> tuple[list[Message], tuple[str, ...]]:
        """Steps 1 to 3: the messages that the reward model's template is given, and what was done to them."""
        text = response if isinstance(response, str) else self.response_text(response)
        notes = []
        if self.opened and not text.lstrip().startswith(self.opened.strip()):
            text = self.opened + text
            notes.append("opened the reasoning block that the policy's prompt opens")
        turn: Message = {"role": "assistant", "content": text}
        if self.options.reasoning != "keep" and CLOSED.search(text):
            turn["content"] = CLOSED.sub("", text)
            if self.options.reasoning == "content-field":
                turn["reasoning_content"] = text[text.index("<think>") + 7 : text.index("</think>")].strip(
                    "\n"
                )
            notes.append(f"reasoning: {self.options.reasoning}")
        result = set_system([*messages, turn], self.options.system)
        steps = (
            (self.joins, join_content, "joined the parts of content"),
            (self.options.drop_tools, drop_tools, "left out tool calls"),
            (self.folds, fold_system, "folded the system message into the first user turn"),
            (self.merges, merge_roles, "merged consecutive turns of one role"),
            (self.wraps, wrap_content, "wrapped content as a list"),
        )
        for wanted, step, note in steps:
            if wanted:
                before, result = result, step(result)
                notes += [note] if result != before else []
        return result, tuple(notes)

    def render(self, messages: Sequence[Message], response: str | Sequence[int]) -> str:
        """What the reward model's own pipeline would render for the adapted messages."""
        return self.rm.render(self.adapt(messages, response)[0])

    def encode(self, messages: Sequence[Message], response: str | Sequence[int]) -> Bridged:
        """messages: the prompt; response: text, or the policy's ids. Raises jinja2.TemplateError where the template
        refuses, TooLong where the response alone passes max_length."""
        adapted, notes = self.adapt(messages, response)
        text = self.rm.render(adapted)
        read = (
            text[: len(text) - len(self.dangling)] if self.dangling and text.endswith(self.dangling) else text
        )
        encoding: Encoding | None = None
        offsets: list[Span] = []
        if forged := forged_spans(self.rm.render, adapted, read, self.rm.markers):
            plain, offsets = self.rm.sanitizer.encode(read, forged)
        else:
            encoding = self.rm.tokenizer.encode(read, add_special_tokens=False)
            plain = list(encoding.ids)
        ids = self._ends(plain)
        same = ids[: len(plain)] == plain
        dropped = 0
        limit = self.options.max_length
        if limit is not None and len(ids) > limit:
            kept = self._response_length(adapted, encoding.offsets if encoding is not None else offsets)
            ids, dropped = self._shortened(ids, kept, limit)
        known = offsets if same and encoding is None else None
        return Bridged(text, ids, adapted, notes, dropped, encoding if same else None, self.after, known)

    def _holds(self, messages: Sequence[Message], word: str) -> bool:
        try:
            text = self.rm.render(messages)
        except TemplateError:
            return False
        return word in text

    def _takes_lists(self) -> bool:
        """Whether the template reads the parts of list content; many print the list as Python does (T007)."""
        listed = wrap_content([user(), assistant()])
        return self._holds(listed, U1) and not self._holds(listed, "'type'")

    def _after(self) -> str | None:
        try:
            text = self.rm.render(self._probe(assistant()))
        except TemplateError:
            return None
        return text[text.rfind(A1) + len(A1) :] if A1 in text else None

    def _dangling(self) -> str:
        """An assistant header that the template leaves after the last answer (finding T022)."""
        try:
            prompt = self.rm.render(self._probe(), True)
        except TemplateError:
            return ""
        cue = prompt[prompt.rfind(U1) + len(U1) :]
        if not cue.strip() or self.after is None or not self.after.endswith(cue):
            return ""
        ending = next((end for end in (*self.rm.ends.tokens, self.rm.ends.text) if end and end in cue), None)
        header = cue[cue.index(ending) + len(ending) :] if ending else cue
        return header if header.strip() else ""

    def _probe(self, *after: Message) -> list[Message]:
        messages = [user(), *after]
        return wrap_content(messages) if self.wraps else messages

    def _end_id(self) -> int | None:
        end = self.options.end
        if end == "template":
            return None
        token = self.rm.tokens.get("eos_token") if end == "eos" else end
        if end == "auto":
            token = next(
                (m for m in self.rm.markers if re.fullmatch(r"<\|?/?(reward|score)\|?>", m, re.I)), None
            )
            if token is None:
                return None
        found = self.rm.tokenizer.token_to_id(token or "")
        if found is None:
            raise UsageError(f"the reward model has no token {token!r} to end its input with")
        return int(found)

    def _ends(self, ids: list[int]) -> list[int]:
        """BOS and end token as the options want them."""
        if self.options.bos == "none":
            ids = ids[1:] if ids[:1] == [self.bos_id] else ids
        elif self.options.bos == "force" and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if self.end_id is not None and ids[-1:] != [self.end_id]:
            ids = [*ids, self.end_id]
        return ids

    def _response_length(self, messages: Sequence[Message], offsets: Sequence[Span]) -> int:
        """Tokens from the beginning of the last answer on."""
        mask = mask_of(offsets, self.rm.spans(messages, "last_assistant")[1])
        return len(mask) - mask.index(1) if 1 in mask else len(mask)

    def _shortened(self, ids: list[int], kept: int, limit: int) -> tuple[list[int], int]:
        """Cut at the left of the prompt, after the BOS; the last `kept`, the response and its end, stay whole."""
        head = 1 if ids[:1] == [self.bos_id] and self.bos_id is not None else 0
        if head + kept + (self.end_id is not None) > limit:
            raise TooLong(f"the response has {kept} tokens, the reward model takes {limit}")
        tail = ids[len(ids) - (limit - head) :]
        return ids[:head] + tail, len(ids) - limit


def opened_reasoning(policy: ChatEncoder) -> str:
    """The tag of a reasoning block that the policy's generation prompt opens and leaves open; "" if it does not."""
    try:
        prompt = policy.render([user()], add_generation_prompt=True)
    except TemplateError:
        return ""
    cue = prompt[prompt.rfind(U1) + len(U1) :]
    tags = list(REASONING.finditer(cue))
    if not tags or re.search(r"/|END_|end_of", tags[-1].group()):  # the last tag decides
        return ""
    return cue[tags[-1].start() :]
