"""Chat templates rendered exactly as transformers' `apply_chat_template` renders them, with jinja2 alone.

The engine is theirs: immutable sandbox, trim_blocks, lstrip_blocks, loop controls, the `generation` tag, a `tojson`
that leaves HTML characters alone, `raise_exception`, `strftime_now`. What differs on purpose: the clock can be pinned,
every failure is a jinja2.TemplateError, and steps, output and the growth of values are bounded (for templates that
nobody has vouched for, CPU time and memory as well: bounded.py).
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Message = dict[str, Any]
Span = tuple[int, int]

MAX_OUTPUT = 32 * 1024 * 1024  # characters of one render; the longest real conversations are far below
MAX_STEPS = 1_000_000  # loop turns and calls of one render; a long conversation needs thousands
MAX_BITS = 65536  # size of a power of integers


class RenderError(jinja2.TemplateError):
    """The template failed in some other way than `raise_exception`; the message names the python error."""


class LimitError(RenderError):
    """The template asked for more time, memory or output than a chat template may have."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` renders its body; where the body lies is not needed here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Budget(threading.local):
    """Steps of the render that runs in this thread: loop turns and calls."""

    steps = 0


_budget = _Budget()


def _step() -> None:
    _budget.steps += 1
    if _budget.steps > MAX_STEPS:
        raise LimitError(f"the template takes more than {MAX_STEPS} steps")


@jinja2.pass_context  # keeps the compiler from folding it into a constant
def _counted(context: Any, values: Any) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


@jinja2.pass_context
def _concatenated(context: Any, values: list[Any]) -> str:
    texts = [str(value) for value in values]
    if sum(map(len, texts)) > MAX_OUTPUT:
        raise LimitError(f"the template builds a text of more than {MAX_OUTPUT} characters")
    return "".join(texts)


class _Counting(NodeTransformer):
    """Loops count their turns, and `~` checks the length of its result, before anything is allocated."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        node.iter.set_environment(self.environment)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        joined = nodes.Filter(parts, "concatenated", [], [], None, None, lineno=node.lineno)
        joined.set_environment(self.environment)
        return joined


class _Environment(ImmutableSandboxedEnvironment):
    """No template runs for long or builds much: loop turns and calls are counted, growing operators checked."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting(self).visit(super()._parse(source, name, filename))
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        elif operator == "+":
            if (
                isinstance(left, (str, list))
                and isinstance(right, (str, list))
                and len(left) + len(right) > MAX_OUTPUT
            ):
                raise LimitError(f"the template builds a value of more than {MAX_OUTPUT} items")
        elif operator == "**" and _bits(left) * _bits(right, exponent=True) > MAX_BITS:
            raise LimitError(f"the template computes a power of more than {MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)


def _bits(value: Any, exponent: bool = False) -> int:
    """The exponent itself, or the size in bits of the base; 0 for what is no integer."""
    if not isinstance(value, int):
        return 0
    return value if exponent else value.bit_length()


def _check_repeat(value: Any, times: Any) -> None:
    if isinstance(value, (str, list, tuple)) and isinstance(times, int) and len(value) * times > MAX_OUTPUT:
        raise LimitError(f"the template repeats a value to more than {MAX_OUTPUT} items")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=2)
def environment(plain: bool = False) -> jinja2.Environment:
    """The one environment: templates are compiled in it and keep no state in it. plain: what an engine without
    transformers' settings makes of a template (finding T006)."""
    if plain:
        env: jinja2.Environment = _Environment()
        env.globals["raise_exception"] = _raise_exception
        return _counting(env)
    env = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    return _counting(env)


def _counting(env: jinja2.Environment) -> jinja2.Environment:
    env.filters["counted"] = _counted
    env.filters["concatenated"] = _concatenated
    return env


@lru_cache(maxsize=256)
def compile_template(source: str, plain: bool = False) -> jinja2.Template:
    """Raises jinja2.TemplateSyntaxError, or RenderError for a source that breaks the compiler (deep nesting)."""
    try:
        return environment(plain).from_string(source)
    except jinja2.TemplateError:
        raise
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise RenderError(f"the template does not compile: {type(error).__name__}: {error}") from error


def render(
    source: str,
    messages: Sequence[Message],
    tokens: dict[str, str | None],
    *,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
    clock: datetime | None = None,
    kwargs: dict[str, Any] | None = None,
    plain: bool = False,
) -> str:
    """The text of a conversation, as `apply_chat_template(tokenize=False)` gives it.

    tokens: bos_token, eos_token, ... as the template sees them; None is left out, so that the variable is undefined.
    kwargs: further variables, which win over tokens. clock: what strftime_now shows; default: now.
    Raises jinja2.TemplateError whatever goes wrong; RenderError and LimitError are its children.
    """
    template = compile_template(source, plain)
    moment = clock
    context: dict[str, Any] = {"strftime_now": lambda form: (moment or datetime.now()).strftime(form)}
    context.update({name: token for name, token in tokens.items() if token is not None})
    context.update(kwargs or {})
    context.update(
        messages=messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt
    )
    pieces: list[str] = []
    size = _budget.steps = 0
    try:
        for piece in template.generate(context):
            size += len(piece)
            if size > MAX_OUTPUT:
                raise LimitError(f"the template writes more than {MAX_OUTPUT} characters")
            pieces.append(piece)
    except jinja2.TemplateError:
        raise
    except RecursionError as error:
        raise LimitError("the template recurses without end") from error
    except MemoryError as error:
        raise LimitError("the template runs out of memory") from error
    except Exception as error:  # a template can raise any python error: 'x' + 1, messages[9], None|length
        raise RenderError(f"{type(error).__name__}: {error}") from error
    return "".join(pieces)
