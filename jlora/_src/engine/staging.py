"""Trace a function of pytrees to a jaxpr: what is traced, what is static, and how results are put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jlora._src.engine import compat
from jlora._src.engine.mutation import changes
from jlora._src.types import FullWeight, LoraWeight, is_attached

_CLOSED_OVER = (
    "jlora traces the function, and a function that is traced cannot change an NNX object that it closes over. "
    "Pass the object as an argument, and return it: `lambda m, x: (m(x), m)`."
)


@dataclasses.dataclass(frozen=True)
class Staged:
    """A function of pytrees as a jaxpr over its array leaves.

    Attributes:
      jaxpr, consts: the open jaxpr of the plain function.
      given: for each of the jaxpr's arguments, the leaf as the caller gave it: an array, or an attached leaf.
      plain: the same with the base, or the whole value, of attached leaves.
      frozen: for each of them, whether it lies in an argument that carries attached leaves.
      rebuild: puts the jaxpr's results back into the function's own structure.
      lost: what the function mutated in its arguments and does not return, one line each.
    """

    jaxpr: Any
    consts: tuple[Any, ...]
    given: list[Any]
    plain: list[Any]
    frozen: list[bool]
    rebuild: Callable[[Iterable[Any]], Any]
    lost: list[str]


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
        inner = treedef.unflatten(full)
        try:
            result = fn(*inner[0], **inner[1])
        except Exception as error:
            if type(error).__name__ == "TraceContextError":  # Flax NNX's
                error.add_note(_CLOSED_OVER)
            raise
        outputs, out["treedef"] = jax.tree.flatten(result)
        out["static"] = [None if is_array(x) else x for x in outputs]
        place = {id(array): i for i, array in enumerate(arrays)}
        found = [(place.get(id(c.old)) if is_array(c.new) else None, c) for c in changes(inner, result, full, treedef)]
        out["changes"] = [(i, c.kept, f"{c.where} is {c.what}") for i, c in found]
        return [x for x in outputs if is_array(x)] + [c.new for i, c in found if i is not None]

    functools.update_wrapper(flat, fn, updated=())  # JAX's own messages then name the user's function
    given, values = [leaves[i] for i in traced], [plain[i] for i in traced]
    jaxpr, consts = compat.open_jaxpr(jax.make_jaxpr(flat)(*values))
    lost: list[str] = []
    if out["changes"]:
        n = sum(x is None for x in out["static"])
        lost = _lost(out["changes"], compat.handed_on(jaxpr)[n:], values)
        jaxpr = jaxpr.replace(outvars=jaxpr.outvars[:n])

    def rebuild(arrays: Iterable[Any]) -> Any:
        rest = iter(arrays)
        return out["treedef"].unflatten([next(rest) if s is None else s for s in out["static"]])

    frozen = _with_attached(leaves, treedef)
    return Staged(jaxpr, consts, given, values, [frozen[i] for i in traced], rebuild, lost)


def _with_attached(leaves: list[Any], treedef: Any) -> list[bool]:
    """For each leaf of ``(args, kwargs)``, whether its argument has an attached leaf."""
    found: list[bool] = []
    for argument in (one for part in treedef.children() for one in part.children()):
        own = leaves[len(found) : len(found) + argument.num_leaves]
        found += [any(map(is_attached, own))] * len(own)
    return found


def _lost(found: list[tuple[int | None, bool, str]], handed_on: list[int | None], values: list[Any]) -> list[str]:
    """The changes that nobody keeps: ``(which value it replaces, if one, kept or not, text)``. For those that replace
    a value, ``handed_on`` says which one the new value is, if it is one, as behind a jit that returns its arguments."""
    same = iter(handed_on)
    lost = []
    for place, kept, text in found:
        if place is not None and next(same) == place:
            continue
        if place is not None and sum(x is values[place] for x in values) > 1:
            lost.append(f"{text}, and another place that holds the same array is not: they were one object")
        elif not kept:
            lost.append(text)
    return lost


def _plain(leaf: Any) -> Any:
    match leaf:
        case FullWeight(base=base, value=value):
            return compat.beside(value.astype(base.dtype), base)
        case LoraWeight(base=base):
            return base
        case _:
            return leaf
