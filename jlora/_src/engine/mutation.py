"""Finds mutations: compares a function's arguments before and after a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, tree_flatten_with_path

from jlora._src import paths
from jlora._src.types import PyTree


class Change(NamedTuple):
    """One place in a function's arguments that it mutated.

    Attributes:
      where: the argument, and the path in it.
      what: the kind of change.
      returned: whether the new leaf, or an object that holds it, is among the function's results.
      old, new: the leaf before and after; None where no single leaf was replaced.
    """

    where: str
    what: str
    returned: bool
    old: Any = None
    new: Any = None


def changes(after: PyTree, results: PyTree, leaves: list[Any], treedef: Any) -> list[Change]:
    """The changes to a function's ``(args, kwargs)``, which were built from ``leaves`` and ``treedef``: found by
    comparing the structure, and the identity of leaves."""
    try:
        new, new_treedef = jax.tree.flatten(after)
        if _equal(treedef, new_treedef) and all(a is b for a, b in zip(leaves, new, strict=True)):
            return []
    except Exception:  # some object can no longer be flattened; `_differences` skips it
        pass
    nodes: set[int] = set()  # of the results
    jax.tree.flatten(results, is_leaf=lambda node: nodes.add(id(node)) or False)  # called with every node
    return list(_differences((), treedef.unflatten(leaves), after, nodes, False))


def _differences(keys: tuple[Any, ...], before: Any, after: Any, nodes: set[int], returned: bool) -> Iterator[Change]:
    try:
        (old, old_rest), (new, new_rest), (again, again_rest) = map(_children, (before, after, after))
    except Exception:  # the object is invalid now, such as an `equinox.nn.State` replaced by a new one
        return
    returned = returned or (id(after) in nodes and (() not in new or isinstance(after, jax.Array)))
    if () in old or () in new:
        if before is not after and not (() in old and () in new and _equal(before, after)):
            yield Change(_where(keys), "replaced", returned, before, after)
        return
    for key in (k for k in old if k not in new):
        yield Change(_where(keys + key), "removed", returned)
    for key in (k for k in new if k not in old):
        leaves = jax.tree.leaves(new[key])
        inside = returned or (bool(leaves) and all(isinstance(x, jax.Array) and id(x) in nodes for x in leaves))
        yield Change(_where(keys + key), "added", inside)
    if old.keys() == new.keys() and not _equal(old_rest, new_rest) and _equal(new_rest, again_rest):
        yield Change(_where(keys), f"changed in a static field of its {type(after).__name__}", returned)
    for key in (k for k in old if k in new):
        if new[key] is again[key] or () not in _children(new[key])[0]:  # else each flattening creates a new leaf
            yield from _differences(keys + key, old[key], new[key], nodes, returned)


def _children(node: Any) -> tuple[dict[tuple[Any, ...], Any], Any]:
    """A node's children by key, and its static part; a leaf's only child is itself, under the key ()."""
    children, rest = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    return dict(children), rest


def _equal(x: Any, y: Any) -> bool:
    """Whether two static values are equal, as far as they can be compared."""
    if isinstance(x, jax.Array) or isinstance(y, jax.Array):
        return False
    try:
        return bool(x == y)
    except Exception:  # they hold arrays, for example
        return True


def _where(keys: tuple[Any, ...]) -> str:
    """The place in ``(args, kwargs)`` at ``keys``, for messages."""
    if len(keys) < 2:
        return "the arguments"
    name = keys[1].key if isinstance(keys[1], DictKey) else keys[1].idx
    path = paths.path_of(keys[2:])
    return f"argument {name!r}" + (f": {path!r}" if path else "")
