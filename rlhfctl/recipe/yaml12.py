"""YAML 1.2 (core schema) to plain values, with the place of every key and value, and back.

PyYAML follows YAML 1.1: it reads `1e-6` as a string, `no` as False, `12:30` as 750, `017` as 15, and keeps the last
of two equal keys in silence. Here the nodes are composed with the resolvers of the 1.2 core schema, and the values
are built from the nodes with their places. Merge keys (`<<`) and tags beyond the core schema do not exist.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from rlhfctl.recipe.errors import Place, Problem, RecipeError

Path = tuple[str | int, ...]

TAG = "tag:yaml.org,2002:"
NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
DIGITS = "0123456789"
# Aliases to aliases multiply: a text of a few lines can mean more values than memory holds.
MOST_VALUES = 100_000
LONGEST_NUMBER = 1000  # digits; Python itself refuses to read much longer ones


class CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  as in the base


class CoreDumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something else than the string it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


CoreLoader.add_implicit_resolver(f"{TAG}null", NULL, ["~", "n", "N", ""])
CoreLoader.add_implicit_resolver(f"{TAG}bool", BOOL, list("tTfF"))
CoreLoader.add_implicit_resolver(f"{TAG}int", INT, list("-+" + DIGITS))
CoreLoader.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+." + DIGITS))
CoreDumper.add_implicit_resolver(f"{TAG}int", INT, list("-+" + DIGITS))
CoreDumper.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+." + DIGITS))


def represent_list(dumper: CoreDumper, items: list[Any]) -> yaml.Node:
    """A list of scalars on one line, any other in blocks."""
    scalars = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence(f"{TAG}seq", items, flow_style=scalars)


CoreDumper.add_representer(list, represent_list)


@dataclass(slots=True)
class Document:
    """value: of the root. keys: where a mapping's key (or a list's item) stands; values: where its value does."""

    value: Any = None
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str, file: str, override: str | None = None) -> Document:
    """Text to values and places. Raises RecipeError where it is not YAML; what can be told besides is in problems."""
    reader = Reader(text, file, override)
    try:
        loader = CoreLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is not None:
            reader.document.value = reader.build(node, ())
            reader.document.values[()] = reader.place(node.start_mark)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError([Problem(syntax_message(error), reader.place(mark) if mark else None)]) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line = before.count("\n")
        place = reader.at(line, error.position - (before.rfind("\n") + 1))
        raise RecipeError(
            [Problem(f"the character #x{error.character:02x} is not allowed in YAML", place)]
        ) from None
    except RecursionError:
        raise RecipeError([Problem("nested too deeply", reader.at(0, 0))]) from None
    return reader.document


def dump(value: Any) -> str:
    """Values to YAML that both YAML 1.1 and 1.2 read back as the same values."""
    text: str = yaml.dump(
        value, Dumper=CoreDumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110
    )
    return text


def syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "cannot be read")
    if "'\\t'" in problem:
        return "not valid YAML: a tab; indent with spaces"
    if "expected a single document" in str(error.context):
        return "a second YAML document begins here: a recipe is one document"
    if "mapping values are not allowed" in problem:
        problem += ": quote a value that holds ': '"
    context = f" {error.context}" if error.context and error.problem else ""
    return f"not valid YAML: {problem}{context}"


class Reader:
    """Builds the values of one text's nodes and notes where they stand."""

    def __init__(self, text: str, file: str, override: str | None) -> None:
        self.lines = text.splitlines()
        self.file = file
        self.override = override
        self.document = Document()
        self.built = 0
        self.open: set[int] = set()  # nodes being built: an alias to one of them would never end

    def at(self, line: int, column: int) -> Place:
        text = self.lines[line] if line < len(self.lines) else ""
        return Place(self.file, line + 1, column + 1, text, self.override)

    def place(self, mark: yaml.Mark) -> Place:
        return self.at(mark.line, mark.column)

    def complain(self, message: str, mark: yaml.Mark, path: Path) -> None:
        self.document.problems.append(Problem(message, self.place(mark), dotted(path)))

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.built += 1
        if self.built > MOST_VALUES:
            place = self.place(node.start_mark)
            raise RecipeError(
                [Problem(f"more than {MOST_VALUES} values, aliases counted as often as used", place)]
            )
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open:
            self.complain("an alias to a value that contains it", node.start_mark, path)
            return None
        if node.tag not in (f"{TAG}map", f"{TAG}seq", "!"):
            self.complain(
                f"the tag {shown_tag(node.tag)} is not part of YAML's core schema", node.start_mark, path
            )
            return None
        self.open.add(id(node))
        try:
            return (
                self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
            )
        finally:
            self.open.discard(id(node))

    def sequence(self, node: yaml.Node, path: Path) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            inner = (*path, index)
            self.document.keys[inner] = self.document.values[inner] = self.place(child.start_mark)
            items.append(self.build(child, inner))
        return items

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain("a key must be a name, not a list or a mapping", key_node.start_mark, path)
                continue
            key = self.whole(key_node, path)
            inner = (*path, key)
            if key in built:
                first = self.document.keys[inner]
                where = "" if self.override else f" (first on line {first.line})"
                self.complain(f"duplicate key {dotted(inner)}{where}", key_node.start_mark, inner)
                continue
            if key == "<<":
                self.complain(
                    "merge keys (<<) are not part of YAML 1.2: use extends", key_node.start_mark, inner
                )
                continue
            self.document.keys[inner] = self.place(key_node.start_mark)
            self.document.values[inner] = self.place(child.start_mark)
            built[key] = self.build(child, inner)
        return built

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        kind, text = node.tag.removeprefix(TAG), node.value
        if kind in ("str", "!"):
            return self.whole(node, path)
        if kind == "null" and NULL.match(text):
            return None
        if kind == "bool" and BOOL.match(text):
            return text.lower() == "true"
        if kind == "int" and INT.match(text) and len(text) < LONGEST_NUMBER:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float" and FLOAT.match(text):
            return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        if kind in ("null", "bool", "int", "float"):
            self.complain(f"{text[:40]!r} is not of the type {shown_tag(node.tag)}", node.start_mark, path)
        else:
            self.complain(
                f"the tag {shown_tag(node.tag)} is not part of YAML's core schema", node.start_mark, path
            )
        return None

    def whole(self, node: yaml.ScalarNode, path: Path) -> str:
        """A text with surrogate pairs, as JSON writes characters (`"\\ud83d\\ude00"`), joined to what they mean."""
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.complain("half of a surrogate pair is no character", node.start_mark, path)
            return ""


def shown_tag(tag: str) -> str:
    return f"!!{tag.removeprefix(TAG)}" if tag.startswith(TAG) else tag


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)
