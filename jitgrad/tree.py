"""Nested containers of arguments and results: taking them apart into leaves, and putting them together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def flatten(tree: Any, leaves: list[Any]) -> Any:
    """Append the leaves of nested tuples, lists and dicts (exact types and named tuples) to `leaves`, in order.
    What is returned is hashable, describes the structure, and is what `unflatten` needs."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind, tuple([flatten(t, leaves) for t in tree])
    if kind is dict:
        return dict, tuple(tree), tuple([flatten(t, leaves) for t in tree.values()])
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind, tuple([flatten(t, leaves) for t in tree])
    leaves.append(tree)
    return None


def unflatten(structure: Any, leaves: list[Any]) -> Any:
    """The tree of this structure with `leaves`, which are consumed from the front in order."""
    return _build(structure, iter(leaves))


def _build(structure: Any, leaves: Any) -> Any:
    if structure is None:
        return next(leaves)
    kind = structure[0]
    if kind is dict:
        return dict(zip(structure[1], [_build(s, leaves) for s in structure[2]]))
    parts = [_build(s, leaves) for s in structure[1]]
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with every leaf replaced by `function(leaf)`."""
    leaves: list[Any] = []
    structure = flatten(tree, leaves)
    return unflatten(structure, [function(leaf) for leaf in leaves])
