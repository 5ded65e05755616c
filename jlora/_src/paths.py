"""Paths name leaves: ``params/layer_0/kernel`` whatever tree library made the tree."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Sharding
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jlora._src.types import LoraFactors, Path, PyTree, is_attached

T = TypeVar("T")


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key)


def path_of(keys: tuple[Any, ...]) -> Path:
    """The path of a leaf from its key path.

    A trailing box attribute (the ``value`` of an NNX variable or of ``nn.Partitioned``) is dropped, so
    that boxing a parameter does not change its name.
    """
    boxed = len(keys) > 1 and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "value"
    return "/".join(_key_name(k) for k in (keys[:-1] if boxed else keys))


def named_leaves(tree: PyTree) -> tuple[dict[Path, Any], Any]:
    """``tree`` as ``({path: leaf}, treedef)`` in the tree's own order; attached leaves stay whole.

    Raises:
      ValueError: when two leaves have the same path, naming every such path.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_attached)
    paths = [path_of(keys) for keys, _ in flat]
    if len(set(paths)) != len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise ValueError(
            f"these paths name more than one leaf: {twice}. Expected one leaf a path; rename the "
            "parameters, or take the parameters out of a tree that holds them twice."
        )
    return {path: leaf for path, (_, leaf) in zip(paths, flat, strict=True)}, treedef


def map_named(fn: Callable[[Path, Any], Any], tree: PyTree) -> PyTree:
    """``tree`` with ``fn(path, leaf)`` in the place of every leaf; attached leaves are leaves."""
    leaves, treedef = named_leaves(tree)
    return treedef.unflatten([fn(path, leaf) for path, leaf in leaves.items()])


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """A clause for error texts that offers the closest names, or nothing; a path is as close as its closest part."""

    def closeness(path: str) -> float:
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in (path, *path.split("/")))

    close = sorted(((closeness(p), p) for p in names), key=lambda pair: -pair[0])[:n]
    return f" (closest: {', '.join(repr(p) for ratio, p in close)})" if close and close[0][0] > 0.5 else ""


def bullets(lines: Iterable[str]) -> str:
    """Lines of an error that lists all its offenders."""
    return "".join(f"\n  - {line}" for line in lines)


def bad_pattern(pattern: Any) -> str | None:
    """What an error says of a pattern that is no regular expression; None for one that is."""
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        return f"{pattern!r} is no regular expression ({error})"
    return None


def check_paths(adapters: Mapping[Path, Any], leaves: Mapping[Path, Any], what: str) -> None:
    """Raises a KeyError that names every path of ``adapters`` that ``leaves`` lacks."""
    if missing := [p for p in adapters if p not in leaves]:
        raise KeyError(
            f"{what}: no leaf of the params has the path"
            + bullets(f"{p!r}{nearest(p, leaves)}" for p in missing)
            + f"\nExpected paths of the given tree, which has {len(leaves)} leaves. Give the same tree that "
            "`jlora.init` was given."
        )


def check_kinds(adapters: Mapping[Path, Any], what: str) -> None:
    """Raises a TypeError that names every value of ``adapters`` that is neither `LoraFactors` nor an array."""
    parts = {path: (v.a, v.b) if isinstance(v, LoraFactors) else (v,) for path, v in adapters.items()}
    odd = {path: part for path, found in parts.items() for part in found if not hasattr(part, "shape")}
    if odd:
        hint = restored_hint(odd)
        if any(isinstance(part, Sharding) for part in odd.values()):
            hint = " The shardings of an attached tree are jlora.adapter_shardings(tree, shardings)."
        raise TypeError(
            f"{what}: {len(odd)} of {len(adapters)} values are no adapters:"
            f"{bullets(f'{path!r}: got a {type(part).__name__}' for path, part in odd.items())}\nExpected LoraFactors "
            f"of arrays, or arrays for leaves that are trained whole, as jlora.init makes them.{hint}"
        )


def restored_hint(tree: Mapping[Any, Any]) -> str:
    """What an error adds when orbax or flax restored adapters as plain dictionaries; else nothing."""
    if not any(isinstance(v, Mapping) and {"a", "b"} <= set(v) for v in tree.values()):
        return ""
    return (
        " Got factors that were restored without a target, so that their scale, axes and dropout are lost: read what "
        "jlora.save wrote with jlora.load, or restore with a target, which is adapters of jlora.init or their shapes."
    )
