"""Trace a function of pytrees to a jaxpr: what is traced, what is static, and how results are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jlora import _compat
from jlora._types import FullWeight, LoraWeight, is_attached


@dataclasses.dataclass(frozen=True)
class Staged:
    """A function of pytrees as a jaxpr over its array leaves.

    Attributes:
      jaxpr, consts: the open jaxpr of the plain function.
      given: for each of the jaxpr's arguments, the leaf as the caller gave it: an array, or an attached leaf.
      plain: the same with the base, or the whole value, of attached leaves.
      rebuild: puts the jaxpr's results back into the function's own structure.
    """

    jaxpr: Any
    consts: tuple[Any, ...]
    given: list[Any]
    plain: list[Any]
    rebuild: Callable[[Iterable[Any]], Any]


def is_array(x: Any) -> bool:
    """Whether a leaf is traced; everything else is static."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def stage(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Staged:
    """``fn(*args, **kwargs)`` as a jaxpr. The arrays themselves are traced, not their shapes, so that what
    JAX knows of them (shardings, varying mesh axes) is kept."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_attached)
    plain = [_plain(leaf) for leaf in leaves]
    traced = [i for i, leaf in enumerate(plain) if is_array(leaf)]
    out: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        full = list(plain)
        for i, array in zip(traced, arrays, strict=True):
            full[i] = array
        inner_args, inner_kwargs = treedef.unflatten(full)
        results, out["treedef"] = jax.tree.flatten(fn(*inner_args, **inner_kwargs))
        out["static"] = [None if is_array(r) else r for r in results]
        return [r for r in results if is_array(r)]

    closed = jax.make_jaxpr(flat)(*(plain[i] for i in traced))
    jaxpr, consts = _compat.open_jaxpr(closed)

    def rebuild(arrays: Iterable[Any]) -> Any:
        rest = iter(arrays)
        return out["treedef"].unflatten([next(rest) if s is None else s for s in out["static"]])

    return Staged(jaxpr, consts, [leaves[i] for i in traced], [plain[i] for i in traced], rebuild)


def _plain(leaf: Any) -> Any:
    match leaf:
        case FullWeight(base=base, value=value):
            return _compat.beside(value.astype(base.dtype), base)
        case LoraWeight(base=base):
            return base
        case _:
            return leaf
