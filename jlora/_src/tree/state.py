"""Finds the leaves of a tree that are state, not parameters: statistics, caches, keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jlora._src.paths import path_of
from jlora._src.types import Path, PyTree

COLLECTIONS = frozenset({"batch_stats", "cache", "intermediates", "perturbations"})
"""Linen collections that each step overwrites, so that an update to them would be lost."""


def state(tree: PyTree) -> dict[Path, str]:
    """``{path: what it is}`` for leaves of Linen's state collections, and of NNX variables other than `Param`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    found: dict[Path, str] = {}
    for keys, leaf in flat:
        path = path_of(keys)
        names = _class_names(leaf)
        if is_variable(leaf) and "Param" not in names:
            paths = (path_of((*keys, *rest)) for rest, _ in jax.tree_util.tree_flatten_with_path(leaf)[0])
            found |= dict.fromkeys(paths, f"an nnx.{names[0]}, not an nnx.Param")
        elif is_linen(tree) and (collection := path.split("/")[0]) in COLLECTIONS:
            found[path] = f"state: Linen's collection {collection!r}"
    return found


def is_linen(tree: PyTree) -> bool:
    """Whether the tree resembles Linen's variables: a mapping of collections, one of them ``params``."""
    return isinstance(tree, Mapping) and "params" in tree


def _class_names(x: Any) -> list[str]:
    return [c.__name__ for c in type(x).__mro__ if c.__module__.startswith("flax.nnx")]


def is_variable(x: Any) -> bool:
    """Whether ``x`` is an NNX variable; by class name, so that flax need not be imported."""
    return "Variable" in _class_names(x)
