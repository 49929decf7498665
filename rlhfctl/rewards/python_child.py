"""The process that runs a user's reward function: loads the file, finds out how it wants to be called, calls it.

Accepted, told apart by the names of the parameters:
    score(samples) -> list[float | dict]                 one list of {"id", "messages", "response", "label", "metadata"}
    reward_func(queries, prompts, labels)                OpenRLHF: texts; a tensor, a list, or {"rewards", "extra_logs"}
    reward(prompts, completions, **columns)              TRL: parallel lists, one of each column of the data
Texts of a prompt are the contents of its messages, joined by newlines. A TRL function is called with texts first;
where no sample can be scored so (TypeError, KeyError, AttributeError) it is called with lists of messages, as TRL does
it for conversational data.
"""

import difflib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from rlhfctl.rewards.child_loop import Handler, NotReady, serve

Sample = dict[str, Any]
Function = Callable[..., Any]

WRONG_FORM = (TypeError, KeyError, AttributeError)  # what a function for one form raises at the other
LABEL_NAMES = ("label", "labels", "answer", "ground_truth", "target")


def main(argv: list[str]) -> None:
    path, name = argv
    serve(lambda: prepare(path, name))


def prepare(path: str, name: str) -> Handler:
    """Imports the file; raises NotReady with one sentence where it or the function is not usable."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("rlhfctl_user_reward", path)
    if spec is None or spec.loader is None:
        raise NotReady(f"{path} is no python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise NotReady(f"cannot import {path}: {describe(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(names) or 'none'}"
        raise NotReady(f"{path} has no function {name!r}{hint}")
    call = adapter(function, name)

    def handle(samples: list[Sample]) -> list[dict[str, Any]]:
        return score(call, samples, path)

    return handle


def adapter(function: Function, name: str) -> Callable[[list[Sample]], list[Any]]:
    """The function behind one signature: samples -> one result each, not yet checked."""
    parameters = inspect.signature(function).parameters
    required = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if "completions" in parameters:
        return _Trl(function)
    if "queries" in parameters:
        return lambda samples: _openrlhf(function, samples)
    if len(required) == 1 or (not required and parameters):
        return lambda samples: _as_list(function(samples))
    raise NotReady(
        f"{name}({', '.join(parameters)}) has none of the accepted signatures: (samples), "
        "(queries, prompts, labels) or (prompts, completions, **columns)"
    )


def _openrlhf(function: Function, samples: list[Sample]) -> list[Any]:
    prompts = [prompt_text(sample) for sample in samples]
    queries = [prompt + sample["response"] for prompt, sample in zip(prompts, samples, strict=True)]
    given = {"queries": queries, "prompts": prompts, "labels": [sample["label"] for sample in samples]}
    result = function(**_accepted(function, given))
    if not isinstance(result, dict):
        return _as_list(result)
    if "rewards" not in result:
        raise ValueError("returned a dict without 'rewards'")
    scores, logs = _as_list(result["rewards"]), result.get("extra_logs") or {}
    columns = {key: values for key, value in logs.items() if len(values := _numbers(value)) == len(scores)}
    found: list[Any] = []
    for index, score in enumerate(scores):
        own = {key: values[index] for key, values in columns.items()}
        found.append(
            {"score": score, "metrics": {key: value for key, value in own.items() if value is not None}}
        )
    return found


def _numbers(logged: Any) -> list[float | None]:
    """What a log says of each query: a finite number or None; [] for one that says something of all at once."""
    if hasattr(logged, "tolist"):
        logged = logged.tolist()
    numbers: list[float | None] = []
    for value in logged if isinstance(logged, (list, tuple)) else ():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        numbers.append(number if math.isfinite(number) else None)
    return numbers


class _Trl:
    """Remembers which of the two forms the function took: that of the first batch which tells."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.form: Function | None = None

    def __call__(self, samples: list[Sample]) -> list[Any]:
        columns = _columns(samples)
        missing = [
            key
            for key, parameter in inspect.signature(self.function).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and key not in ("prompts", "completions", *columns)
        ]
        if missing:
            raise ValueError(f"needs a column {missing[0]!r}; the rows have {', '.join(sorted(columns))}")
        if self.form is not None:
            return self._call(self.form, columns, samples)
        # An empty text can be taken for a list without messages, or has no first one: it tells nothing.
        telling = [sample if sample["response"] else {**sample, "response": "-"} for sample in samples]
        form, result = self._first(columns, telling)
        return result if telling == samples else self._call(form, columns, samples)

    def _first(self, columns: dict[str, list[Any]], samples: list[Sample]) -> tuple[Function, list[Any]]:
        """The form that is taken, and the scores. A function that trips over one text (of a row without a label, say)
        still takes texts: called with lists it may find nothing in any of them, and say 0."""
        try:
            result = self._call(_texts, columns, samples)
        except WRONG_FORM as error:
            reason = f"{type(error).__name__}: {error}"
            if len(samples) > 1 and any(self._takes_text(sample) for sample in samples):
                self.form = _texts
                raise
        else:
            self.form = _texts
            return _texts, result
        try:
            result = self._call(_conversations, columns, samples)
        except WRONG_FORM as error:
            other = f"{type(error).__name__}: {error}"
            raise TypeError(f"called with texts: {reason}; called with lists of messages: {other}") from None
        if len(samples) > 1:  # one alone may be the one that a function for texts trips over
            self.form = _conversations
        return _conversations, result

    def _takes_text(self, sample: Sample) -> bool:
        try:
            self._call(_texts, _columns([sample]), [sample])
        except Exception:
            return False
        return True

    def _call(self, form: Function, columns: dict[str, list[Any]], samples: list[Sample]) -> list[Any]:
        return _as_list(self.function(**_accepted(self.function, {**columns, **form(samples)})))


def _texts(samples: list[Sample]) -> dict[str, list[Any]]:
    return {
        "prompts": [prompt_text(sample) for sample in samples],
        "completions": [sample["response"] for sample in samples],
    }


def _conversations(samples: list[Sample]) -> dict[str, list[Any]]:
    return {
        "prompts": [sample["messages"] for sample in samples],
        "completions": [[{"role": "assistant", "content": sample["response"]}] for sample in samples],
    }


def _columns(samples: list[Sample]) -> dict[str, list[Any]]:
    """Every metadata column as a list with one value a sample (None where a row lacks it), id and label."""
    names = {key for sample in samples for key in sample["metadata"]}
    columns = {key: [sample["metadata"].get(key) for sample in samples] for key in names}
    for key in LABEL_NAMES:
        columns.setdefault(key, [sample["label"] for sample in samples])
    columns.setdefault("id", [sample["id"] for sample in samples])
    return columns


def prompt_text(sample: Sample) -> str:
    return "\n".join(str(message.get("content") or "") for message in sample["messages"])


def _accepted(function: Function, given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return given
    return {key: value for key, value in given.items() if key in parameters}


def _as_list(result: Any) -> list[Any]:
    """A list, or anything with tolist (arrays and tensors on any device)."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise ValueError(f"returned {type(result).__name__} instead of a list of scores")
    return list(result)


def score(
    call: Callable[[list[Sample]], list[Any]], samples: list[Sample], path: str
) -> list[dict[str, Any]]:
    """One outcome dict a sample. Where the call raises for a batch, the samples are scored one by one, so that
    only those that raise on their own are failures."""
    try:
        results = call(samples)
    except BaseException as error:
        if len(samples) == 1 or isinstance(error, MemoryError):
            return [_failure(describe(error, path))] * len(samples)
        return [score(call, [sample], path)[0] for sample in samples]
    if len(results) != len(samples):
        return [_failure(f"returned {len(results)} scores for {len(samples)} samples")] * len(samples)
    return [outcome(result, sample) for result, sample in zip(results, samples, strict=True)]


def outcome(result: Any, sample: Sample) -> dict[str, Any]:
    """{"status", "score", "spans", "metrics", "error"} of one result: a number, a dict with `score`, or None."""
    if result is None:
        return {**_failure("returned None"), "status": "missing"}
    given = result if isinstance(result, dict) else {"score": result}
    if "score" not in given:
        return _failure("returned a dict without 'score'")
    if given["score"] is None:
        return {**_failure("returned the score None"), "status": "missing"}
    try:
        value = float(given["score"])
        metrics = {str(key): float(metric) for key, metric in (given.get("metrics") or {}).items()}
        spans = [[int(s["start"]), int(s["end"]), float(s["score"])] for s in given.get("spans") or []]
    except OverflowError:  # a whole number that no float can hold
        return _failure(f"returned a number that is not finite: {shown(result)}")
    except Exception as error:  # what the user's objects raise when they are read as numbers
        return _failure(f"returned something that is not a score ({error}): {shown(result)}")
    length = len(sample["response"])
    if not all(math.isfinite(number) for number in (value, *metrics.values(), *(span[2] for span in spans))):
        return _failure(f"returned a number that is not finite: {shown(result)}")
    if not all(0 <= start < end <= length for start, end, _ in spans):
        return _failure(f"returned a span outside the response (0 to {length}): {shown(spans)}")
    return {"status": "ok", "score": value, "spans": spans, "metrics": metrics, "error": None}


def shown(value: Any) -> str:
    """Shortened; the type alone of what cannot be written out (a whole number of thousands of digits)."""
    try:
        return str(value)[:80]
    except Exception:
        return type(value).__name__


def _failure(error: str) -> dict[str, Any]:
    return {"status": "error", "score": None, "spans": [], "metrics": {}, "error": error}


def describe(error: BaseException, path: str) -> str:
    """The exception with the line of the user's file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
