"""Trace a function of pytrees to a jaxpr: split its leaves into traced and static, and rebuild its results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jlora._src.engine import compat
from jlora._src.engine.dependence import forwarded_inputs
from jlora._src.engine.mutation import changes
from jlora._src.quantized import QuantizedArray, is_one_leaf
from jlora._src.types import FullWeight, LoraWeight, RowWeight, is_attached

_CLOSED_OVER = (
    "jlora traces the function, and a traced function cannot mutate an NNX object that it closes over. "
    "Pass the object as an argument, and return it: `lambda m, x: (m(x), m)`."
)


@dataclasses.dataclass(frozen=True)
class Staged:
    """A function of pytrees as a jaxpr over its array leaves.

    Attributes:
      jaxpr, consts: the open jaxpr of the function, on plain arrays.
      leaves: for each of the jaxpr's arguments, the caller's leaf: an array, or an attached leaf.
      arrays: the arrays of these leaves; of an attached leaf, the base or the trained value.
      frozen: for each of them, whether its argument has attached leaves.
      rebuild: restores the function's result structure from the jaxpr's results.
      lost: the mutations of its arguments that the function does not return, one line each.
    """

    jaxpr: Any
    consts: tuple[Any, ...]
    leaves: list[Any]
    arrays: list[Any]
    frozen: list[bool]
    rebuild: Callable[[Iterable[Any]], Any]
    lost: list[str]


def is_array(x: Any) -> bool:
    """Whether a leaf is traced; all others are static."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | QuantizedArray)


def check_callable(fn: Any, what: str) -> None:
    """Raises a TypeError for something that is not a function, such as the pair that `hk.transform` returns."""
    if not callable(fn):
        raise TypeError(
            f"{what}: got a {type(fn).__name__} as the function; expected one that takes the parameters first, such as "
            "model.apply"
        )


def replace_leaves(leaves: list[Any], positions: list[int], arrays: Iterable[Any]) -> list[Any]:
    """``leaves`` with ``arrays`` at these positions."""
    given = dict(zip(positions, arrays, strict=True))
    return [given.get(i, leaf) for i, leaf in enumerate(leaves)]


def stage(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Staged:
    """``fn(*args, **kwargs)`` as a jaxpr. The arrays themselves are traced, not their shapes, so that what JAX knows
    about them (shardings, varying mesh axes) is kept."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_one_leaf)
    arrays = [_array_of(leaf) for leaf in leaves]
    traced = [i for i, leaf in enumerate(arrays) if is_array(leaf)]
    call = _TracedCall(fn, arrays, treedef, traced)
    functools.update_wrapper(call, fn, updated=())  # JAX's own messages then name the user's function
    values = [arrays[i] for i in traced]
    jaxpr, consts = compat.open_jaxpr(jax.make_jaxpr(call)(*map(_traceable, values)))
    lost: list[str] = []
    if call.changes:
        n = sum(x is None for x in call.static)
        lost = _lost(call.changes, forwarded_inputs(jaxpr)[n:], values)
        jaxpr = jaxpr.replace(outvars=jaxpr.outvars[:n])
    frozen = _with_attached(leaves, treedef)
    return Staged(jaxpr, consts, [leaves[i] for i in traced], values, [frozen[i] for i in traced], call.rebuild, lost)


class _TracedCall:
    """A function of the traced arrays alone, and the findings of its last call.

    Attributes:
      treedef, static: the structure of the result, and its non-array leaves, with None in place of arrays.
      changes: the mutations: the position of the replaced array, if any, whether the change is returned, and a line
        that describes it. The new arrays follow the function's results among the results of the call.
    """

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], treedef: Any, traced: list[int]):
        self._fn, self._leaves, self._treedef, self._traced = fn, leaves, treedef, traced
        self.treedef: Any = None
        self.static: list[Any] = []
        self.changes: list[tuple[int | None, bool, str]] = []

    def __call__(self, *arrays: Any) -> list[Any]:
        leaves = replace_leaves(self._leaves, self._traced, arrays)
        args, kwargs = inner = self._treedef.unflatten(leaves)
        try:
            result = self._fn(*args, **kwargs)
        except Exception as error:
            if type(error).__name__ == "TraceContextError":  # Flax NNX's
                error.add_note(_CLOSED_OVER)
            raise
        outputs, self.treedef = jax.tree.flatten(result)
        self.static = [None if is_array(x) else x for x in outputs]
        place = {id(array): i for i, array in enumerate(arrays)}
        changed = [
            (place.get(id(c.old)) if is_array(c.new) else None, c)
            for c in changes(inner, result, leaves, self._treedef)
        ]
        self.changes = [(i, c.returned, f"{c.where} is {c.what}") for i, c in changed]
        return [x for x in outputs if is_array(x)] + [c.new for i, c in changed if i is not None]

    def rebuild(self, arrays: Iterable[Any]) -> Any:
        rest = iter(arrays)
        return self.treedef.unflatten([next(rest) if s is None else s for s in self.static])


def _with_attached(leaves: list[Any], treedef: Any) -> list[bool]:
    """For each leaf of ``(args, kwargs)``, whether its argument has an attached leaf."""
    found: list[bool] = []
    for argument in (one for part in treedef.children() for one in part.children()):
        own = leaves[len(found) : len(found) + argument.num_leaves]
        found += [any(map(is_attached, own))] * len(own)
    return found


def _lost(changed: list[tuple[int | None, bool, str]], forwarded: list[int | None], values: list[Any]) -> list[str]:
    """The changes that are not returned. For a replaced value, ``forwarded`` identifies the new one with another value,
    if it is one, as behind a jit that returns its arguments."""
    sources = iter(forwarded)
    lost = []
    for place, returned, text in changed:
        if place is not None and next(sources) == place:
            continue
        if place is not None and sum(x is values[place] for x in values) > 1:
            lost.append(f"{text}, but another place that holds the same array is not: both were one object")
        elif not returned:
            lost.append(text)
    return lost


def _array_of(leaf: Any) -> Any:
    match leaf:
        case FullWeight(base=base, value=value):
            like = base.codes if isinstance(base, QuantizedArray) else base
            return compat.to_memory_of(value.astype(base.dtype), like)
        case LoraWeight(base=base) | RowWeight(base=base):
            return base
        case _:
            return leaf


def _traceable(array: Any) -> Any:
    """An array, or the type of the one that a quantized weight stands for."""
    return compat.with_dtype(array.codes, array.dtype) if isinstance(array, QuantizedArray) else array
