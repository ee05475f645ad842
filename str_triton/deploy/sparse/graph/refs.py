"""Arguments that are other nodes' values, in nested tuples, lists and dicts."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ref:
    """An argument that is another node's value."""

    name: str


def substitute(tree: Any, values: dict[str, Any]) -> Any:
    """Return nested arguments with every Ref replaced by its value."""
    match tree:
        case Ref(name):
            return values[name]
        case dict():
            return {key: substitute(value, values) for key, value in tree.items()}
        case list():
            return [substitute(value, values) for value in tree]
        case tuple():
            return tuple(substitute(value, values) for value in tree)
        case slice():
            return slice(*(substitute(part, values) for part in (tree.start, tree.stop, tree.step)))
    return tree


def references(tree: Any) -> list[str]:
    """Return the names of the nodes in nested arguments."""
    match tree:
        case Ref(name):
            return [name]
        case dict():
            return [name for value in tree.values() for name in references(value)]
        case list() | tuple():
            return [name for value in tree for name in references(value)]
        case slice():
            return references((tree.start, tree.stop, tree.step))
    return []


def rename(tree: Any, names: dict[str, str]) -> Any:
    """Return nested arguments with the names of nodes replaced."""
    return substitute(tree, {name: Ref(names.get(name, name)) for name in references(tree)})
