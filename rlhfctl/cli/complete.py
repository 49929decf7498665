"""What the shell completions ask: the words typed so far, to candidates, one per line.

`_RLHFCTL_COMPLETE=zsh rlhfctl WORD... PREFIX` (or `fish`) prints `candidate<TAB>description`. With `bash` the line up
to the cursor is in COMP_LINE, since bash's own words are torn at `=`; candidates come back as bash inserts them.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from rlhfctl.cli.options import PATHS_OF

Candidate = tuple[str, str]

# The values of each command's options, "": of rlhfctl itself. What a command accepts is checked where it is read.
VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"--completion": ("bash", "zsh", "fish")},
    "eval": {
        "--search": ("greedy", "sample", "best-of-n", "beam"),
        "--engine": ("hf", "vllm", "vllm_server"),
    },
    "serve-rm": {
        "--engine": ("plain", "vllm"),
        "--dtype": ("auto", "float32", "bfloat16"),
        "--match": ("exact", "normalised", "fuzzy"),
    },
}
TRAINING = ("sft", "rm", "ppo", "reft", "oreo")
SPECIAL = re.compile(r"""([\s'"\\$&;|<>()*?\[\]{}!#`])""")
SPECIAL_IN_QUOTES = re.compile(r'(["$`\\])')  # in double ones; in single ones nothing is


def complete(cli: Any, shell: str, argv: list[str]) -> int:
    """Print the candidates; nothing on any failure: a shell must not show a traceback for a TAB."""
    try:
        line = os.environ.get("COMP_LINE", "")
        typed = split_line(line)[1:] if shell == "bash" else argv
        words = typed or [""]
        found = [each for each in candidates(cli, words[:-1], words[-1]) if each[0].startswith(words[-1])]
        if shell == "bash":
            lines = [inserted(value, words[-1], line) for value, _ in found]
        else:
            lines = [f"{value}\t{help}".rstrip("\t") for value, help in found]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except Exception:
        if os.environ.get("RLHFCTL_DEBUG", "") not in ("", "0"):
            raise
        return 1
    return 0


def split_line(line: str) -> list[str]:
    """As the shell splits it, an open quote at the end allowed; the last word is the one being typed."""
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(line + closing)
        except ValueError:
            continue
        return [*words, ""] if not closing and line[-1:].isspace() else words
    return line.split(" ")


def inserted(value: str, typed: str, line: str) -> str:
    """What bash puts in the place of the word it sees: that begins behind an open quote, or behind the last = or :."""
    start = open_quote(line)
    if start is not None:
        before = "" if line[start - 1].isspace() else split_line(line[:start])[-1]
        rest = value[len(before) :]
        return SPECIAL_IN_QUOTES.sub(r"\\\1", rest) if line[start] == '"' else rest
    kept = torn_off(typed, os.environ.get("COMP_WORDBREAKS", "=:"))
    escaped = SPECIAL.sub(r"\\\1", value)[len(SPECIAL.sub(r"\\\1", kept)) :]
    return f"\\{escaped}" if value.startswith("~") and not typed.startswith("~") else escaped


def open_quote(line: str) -> int | None:
    """Where the quote stands that is still open at the end of the line."""
    quote, place, skip = "", 0, False
    for index, char in enumerate(line):
        if skip:
            skip = False
        elif char == "\\" and quote != "'":
            skip = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote, place = char, index
    return place if quote else None


def torn_off(word: str, breaks: str) -> str:
    """The part of a word that bash keeps in front of what it replaces."""
    return (
        word[: max(word.rfind(mark) for mark in "=:" if mark in breaks) + 1]
        if set("=:") & set(breaks)
        else ""
    )


def candidates(cli: Any, words: list[str], prefix: str) -> Iterator[Candidate]:
    name = next((word for word in words if not word.startswith("-")), None)
    command = cli.commands.get(name) if name else cli
    if command is None:
        return
    if prefix.startswith("-"):
        yield from options(command)
        return
    taking = dict(flags(command))
    if words and words[-1] in taking:
        yield from values(name or "", words[-1], taking[words[-1]], words, prefix)
        return
    if name is None:
        for each, subcommand in cli.commands.items():
            yield each, subcommand.get_short_help_str(80)
        return
    given = positionals(words[words.index(name) + 1 :], set(taking))
    if name in TRAINING:
        if not given:
            yield from recipes(prefix)
        if given or "--resume" in words:
            yield from overrides(name, prefix)
    elif name == "recipes":
        yield from recipe_actions(given)
    elif name == "doctor":
        yield from overrides(task_of(given[0]), prefix) if given else recipes(prefix)
    elif name == "report":
        yield from runs(prefix)
    elif name == "eval":
        yield from runs(prefix) if not given else ()
    else:
        yield from shipped(prefix) if name == "inspect-template" and not given else ()
        yield from files(prefix)


def flags(command: Any) -> Iterator[tuple[str, str]]:
    """The names of each option that takes a value, with what the help calls it: FILE, DIR, N, ..."""
    for param in command.params:
        if param.param_type_name == "option" and not param.is_flag:
            for flag in param.opts:
                yield flag, param.metavar or ""


def values(name: str, flag: str, kind: str, words: list[str], prefix: str) -> Iterator[Candidate]:
    """What may stand behind an option of the command `name`."""
    if flag == "--verifier":
        from typing import get_args

        from rlhfctl.recipe.sections import VerifierSource

        yield from ((each, "") for each in get_args(VerifierSource.model_fields["name"].annotation))
    elif flag in VALUES.get(name, {}):
        yield from ((value, "") for value in VALUES[name][flag])
    elif flag == "--run-dir" and "--resume" in words:
        yield from runs(prefix)
    elif kind in PATHS_OF:
        yield from files(prefix, directories_only=flag == "--run-dir")


def options(command: Any) -> Iterator[Candidate]:
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            for flag in param.opts:
                yield flag, param.help or ""
    yield "--help", "Show this message and exit."


def positionals(words: list[str], taking: set[str]) -> list[str]:
    given, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in taking:
            skip = True
        elif word == "-" or not word.startswith("-"):
            given.append(word)
    return given


def recipe_actions(given: list[str]) -> Iterator[Candidate]:
    from rlhfctl.recipe.catalogue import shipped_names

    if not given:
        yield from (
            ("list", "names and what they do"),
            ("show", "one recipe"),
            ("schema", "JSON Schema of a task"),
        )
    elif given == ["show"]:
        yield from ((name, "") for name in shipped_names())
    elif given == ["schema"]:
        yield from ((task, "") for task in TRAINING)


def recipes(prefix: str) -> Iterator[Candidate]:
    yield from shipped(prefix)
    yield from files(prefix, endings=(".yaml", ".yml"))


def shipped(prefix: str) -> Iterator[Candidate]:
    from rlhfctl.recipe.catalogue import shipped_names, shipped_path, summary

    for name in shipped_names():
        path = shipped_path(name) if name.startswith(prefix) else None
        if path is not None:
            yield name, summary(path)


def files(prefix: str, directories_only: bool = False, endings: tuple[str, ...] = ()) -> Iterator[Candidate]:
    folder, slash, start = prefix.rpartition("/")
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder + slash) or "."), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
            continue
        if entry.is_dir():
            yield f"{folder}{slash}{entry.name}/", ""
        elif not directories_only and (not endings or entry.name.endswith(endings)):
            yield f"{folder}{slash}{entry.name}", ""


def runs(prefix: str) -> Iterator[Candidate]:
    """Run directories, whole, with how they ended; other directories, to look into."""
    for path, _ in files(prefix, directories_only=True):
        inside = os.path.expanduser(path)
        if os.path.isfile(f"{inside}recipe.yaml"):
            yield path.rstrip("/"), ending(inside)
        else:
            yield path, ""


def ending(run: str) -> str:
    import json

    try:
        with open(f"{run}status.json", encoding="utf-8") as file:
            status = json.load(file)
        return f"{status['state']} at step {status['step']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "a run"


def task_of(source: str) -> str:
    """The task of a recipe, for a command that takes recipes of all tasks. Raises where it cannot be told."""
    from rlhfctl.recipe.load import read_source, read_tree

    if source == "-":
        raise ValueError("standard input is read by the command, not by a completion")
    task: str = read_tree(*read_source(source), [], []).root["task"]
    return task


def overrides(task: str, prefix: str) -> Iterator[Candidate]:
    """Keys one level at a time (`algorithm.`, then `algorithm.clip_epsilon=`), then the values that can be told."""
    from rlhfctl.recipe.keys import keys_of
    from rlhfctl.recipe.paths import PATHS, WORDS

    typed, equals, value = prefix.partition("=")
    schema_prefix = re.sub(r"(?<=\.)\d+(?=\.|$)", "0", typed)
    if equals:
        for key in keys_of(task):
            if key.path == schema_prefix:
                yield from ((f"{typed}={choice}", "") for choice in key.choices)
        yield from ((f"{typed}={word}", "") for word in WORDS.get(schema_prefix, ()))
        if schema_prefix.replace(".0.", ".*.") in PATHS:
            yield from ((f"{typed}={path}", "") for path, _ in files(value))
        return
    level = schema_prefix.rpartition(".")[0]
    shown = typed.rpartition(".")[0]
    for key in keys_of(task):
        parent, _, name = key.path.rpartition(".")
        if parent == level:
            end = "=" if not key.section else ".0." if key.items else "."
            yield f"{shown}.{name}{end}" if shown else f"{name}{end}", key.description
