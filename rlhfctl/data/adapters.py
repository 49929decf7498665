"""One adapter per row format: a row as read becomes a Sample, or raises BadRow with the reason.

Each adapter takes the columns it knows out of the row; everything that is left is the sample's metadata,
untouched. `id` is the row's own (id, item_id or unique_id) or a hash of its content; `label` is the row's
`label` column, for `qa` the reference answer.
"""

from collections.abc import Callable
from typing import Any

from rlhfctl.data.bad_row import BadRow
from rlhfctl.data.qa import question_parts
from rlhfctl.data.reasoning import ncot, pcot
from rlhfctl.data.samples import Message, Sample, content_id
from rlhfctl.data.turns import (
    WEIGHTS,
    check_weights,
    hh_turns,
    messages_from,
    response_text,
    says_more,
    sharegpt_turns,
    text_or_messages,
)

Row = dict[str, Any]

ID_COLUMNS = ("id", "item_id", "unique_id")
MESSAGES_COLUMNS = ("messages", "conversation", "conversations")
RESPONSE_COLUMNS = ("response", "completion", "output")
HH_COLUMNS = ("chosen", "transcript", "text")


def adapt(row: Row, format: str, system: str | None = None) -> Sample:
    """A sample of the row. `system` is put before rows that have no system message."""
    rest = dict(row)
    identity = take_id(rest, row)
    messages, response, label = ADAPTERS[format](rest)
    check_weights(messages)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Sample(identity, messages, response, label, rest)


def take_id(rest: Row, row: Row) -> str:
    try:
        hashed = content_id(_without_none(row))
    except UnicodeEncodeError:
        raise BadRow("holds half of a surrogate pair, which no tokenizer can encode") from None
    for column in ID_COLUMNS:
        given = rest.get(column)
        if isinstance(given, (str, int)) and not isinstance(given, bool) and given != "":
            return str(rest.pop(column))
    return hashed


def _without_none(value: Any) -> Any:
    """Absent and None are one: a table must give the ids that the same rows have as JSON lines."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _messages(rest: Row) -> tuple[list[Message], str | None, Any]:
    column = first_of(rest, MESSAGES_COLUMNS, "messages")
    return with_system(messages_from(rest.pop(column), column), rest), None, rest.pop("label", None)


def _sharegpt(rest: Row) -> tuple[list[Message], str | None, Any]:
    column = first_of(rest, ("conversations", "conversation"), "sharegpt")
    messages = with_system(sharegpt_turns(rest.pop(column), column), rest)
    return messages, None, rest.pop("label", None)


def _alpaca(rest: Row) -> tuple[list[Message], str | None, Any]:
    instruction, context = rest.pop("instruction", None), rest.pop("input", None)
    if not isinstance(instruction, str) or not instruction.strip():
        raise BadRow("instruction is empty")
    if context is not None and not isinstance(context, str):
        raise BadRow("input must be a text")
    messages: list[Message] = []
    for index, pair in enumerate(rest.pop("history", None) or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow(f"history[{index}] must be a pair of instruction and answer")
        turns = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        messages += messages_from(turns, f"history[{index}]")
    messages.append({"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction})
    response = response_text(rest.pop("output", None), "output")
    return with_system(messages, rest), response, rest.pop("label", None)


def _prompt_response(rest: Row) -> tuple[list[Message], str | None, Any]:
    if "prompt" not in rest:
        raise BadRow("has no prompt")
    messages = with_system(text_or_messages(rest.pop("prompt"), "prompt"), rest)
    column = next((column for column in RESPONSE_COLUMNS if column in rest), None)
    if column is not None and (answer := _rich_answer(rest[column], column)) is not None:
        del rest[column]
        return [*messages, answer], None, rest.pop("label", None)
    response = None if column is None else response_text(rest.pop(column), column)
    return messages, response, rest.pop("label", None)


def _rich_answer(value: Any, column: str) -> Message | None:
    """One assistant message with more than text, or a weight of 0; it stays a message, as those of `messages` rows."""
    turn = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(turn, dict) or turn.get("role") != "assistant":
        return None
    if not says_more(turn) and all(turn.get(key) in (None, 1) for key in WEIGHTS):
        return None
    return messages_from([turn], column)[0]


def _hh_transcript(rest: Row) -> tuple[list[Message], str | None, Any]:
    column = first_of(rest, HH_COLUMNS, "hh_transcript")
    return hh_turns(rest.pop(column), column), None, rest.pop("label", None)


def _qa(rest: Row) -> tuple[list[Message], str | None, Any]:
    question, label, worked = question_parts(rest)
    response = response_text(worked if isinstance(worked, (str, list, dict)) else str(worked), "answer")
    return with_system([{"role": "user", "content": question}], rest), response, label


def first_of(rest: Row, columns: tuple[str, ...], format: str) -> str:
    for column in columns:
        if rest.get(column) is not None:
            return column
    raise BadRow(f"has none of the columns that {format} rows have ({', '.join(columns)})")


def with_system(messages: list[Message], rest: Row) -> list[Message]:
    system = rest.get("system")
    if not isinstance(system, str) or messages[0]["role"] == "system":
        return messages
    del rest["system"]
    return [{"role": "system", "content": system}, *messages] if system else messages


ADAPTERS: dict[str, Callable[[Row], tuple[list[Message], str | None, Any]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_response": _prompt_response,
    "hh_transcript": _hh_transcript,
    "qa": _qa,
    "ncot": ncot,
    "pcot": pcot,
}
