"""A recipe as plain values before it is checked: bases merged, overrides applied, every value's place kept."""

from dataclasses import dataclass, field
from typing import Any

from rlhfctl.recipe.errors import Place
from rlhfctl.recipe.yaml12 import Document, Path


@dataclass(slots=True)
class Tree:
    """keys and values: the place of each path's key and value, in whichever file or override it was given."""

    root: dict[str, Any] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)

    def graft(self, path: Path, value: Any, document: Document) -> None:
        """Put a document's value at `path`, its places with it; what stood there is gone."""
        self.forget(path)
        container: Any = self.root
        for part in path[:-1]:
            container = container[part]
        if isinstance(container, list) and path[-1] == len(container):
            container.append(value)
        else:
            container[path[-1]] = value
        self.keys |= {(*path, *inner): place for inner, place in document.keys.items()}
        self.values |= {(*path, *inner): place for inner, place in document.values.items()}

    def forget(self, path: Path) -> None:
        for places in (self.keys, self.values):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]

    def place(self, path: Path, of_key: bool = False) -> Place | None:
        """Where `path` is given; else where the first value inside it is, which made it; else the section around."""
        places = self.keys if of_key else self.values
        while path and path not in places:
            inside = next((known for known in self.values if known[: len(path)] == path), None)
            if inside is not None:
                return self.values[inside]
            path, places = path[:-1], self.keys
        return places.get(path) or self.values.get(path)


def merge(base: Tree, child: Tree) -> Tree:
    """Sections key by key, any other value (lists too) replaced by the child's."""
    merged = Tree(base.root, dict(base.keys), dict(base.values))
    merged.root = merge_into(merged, base.root, child.root, ())
    merged.keys |= child.keys
    merged.values |= child.values
    return merged


def merge_into(merged: Tree, base: dict[str, Any], child: dict[str, Any], path: Path) -> dict[str, Any]:
    both = dict(base)
    for key, value in child.items():
        inner = (*path, key)
        if isinstance(value, dict) and isinstance(both.get(key), dict):
            both[key] = merge_into(merged, both[key], value, inner)
        else:
            merged.forget(inner)
            both[key] = value
    return both
