"""`stack` several adapters of one base into one tree with a leading axis, for `jax.vmap`; `unstack` them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.engine.named_axes import accumulation_dtype
from jlora._src.paths import bullets, check_kinds
from jlora._src.types import Adapters, Array, LoraFactors, Path


def stack(adapters: Sequence[Adapters]) -> dict[Path, LoraFactors | Array]:
    """Adapters of one base as one tree, each array with a leading axis over them.

    >>> both = jlora.stack([first, second])
    >>> logits = jax.vmap(lambda a: apply(jlora.attach(params, a), batch))(both)

    Each keeps its update: ranks are padded with zeros to the largest one; where scales differ they are folded into B,
    which is then float32 or wider, and the stacked scale is 1; an adapter that lacks a path gets zeros there. In
    training, padding stays zero, while a scale that was folded into B no longer scales its gradient: to train with
    several scales in one stack, give the adapters one alpha and rank, and `attach` a ``strength`` for each.

    Args:
      adapters: two or more, or one, for the same params; of `init`, or their shapes under `jax.eval_shape`.

    Returns:
      ``{path: LoraFactors | array}`` over all paths: ``a`` of shape ``[n, *batch, *inputs, rank]``, ``b`` of shape
      ``[n, *batch, rank, *outputs]``, ``magnitude`` of ``[n, *batch, *outputs]``, and whole leaves of ``[n, *shape]``.
      Where dtypes differ, in the one to which they promote.

    Raises:
      ValueError: naming every path whose adapters differ in kind, axes, shape or dropout rate, or which some adapters
        lack though no zeros can stand for them: leaves trained whole, and DoRA, whose magnitude comes from the base.
      TypeError: when a value is neither factors nor an array.
    """
    trees = list(adapters)
    if not trees:
        raise ValueError("stack: got no adapters; expected one or more.")
    for i, tree in enumerate(trees):
        check_kinds(tree, f"stack, adapters {i}")
    paths = dict.fromkeys(path for tree in trees for path in tree)
    columns = {path: [tree.get(path) for tree in trees] for path in paths}
    if wrong := [f"{path!r}: {problem}" for path, column in columns.items() for problem in _differences(column)]:
        raise ValueError(
            f"stack: {len(wrong)} differences between the {len(trees)} adapters:{bullets(wrong)}\nExpected adapters of "
            "one base that differ in rank, scale and values alone. An adapter that lacks a path can be given what "
            "changes nothing, {**jlora.init(key, params, config), **adapters} with the config of the others."
        )
    return {path: _stacked(column) for path, column in columns.items()}


def unstack(stacked: Adapters) -> list[dict[Path, LoraFactors | Array]]:
    """The adapters of a `stack`, one by one: with the ranks and scales of the stack, and so with the same updates.

    >>> first, second = jlora.unstack(both)

    Raises:
      ValueError: naming every path whose arrays have no leading axis, or one of another size than the others'.
      TypeError: when a value is neither factors nor an array.
    """
    check_kinds(stacked, "unstack")
    sizes = {path: _sizes(value) for path, value in stacked.items()}
    every = [size for found in sizes.values() for size in found if size is not None]
    n = max(every, key=every.count, default=None)
    odd = {path: found for path, found in sizes.items() if None in found or found != {n}}
    if n is None or odd:
        wrong = (f"{p!r}: got {found - {None} or 'no such axis'}, expected {n or 'one'}" for p, found in odd.items())
        raise ValueError(
            f"unstack: these have no leading axis over one number of adapters:{bullets(wrong)}\nExpected the result of "
            "jlora.stack, or of a jax.vmap over one."
        )
    return [jax.tree.map(lambda x, i=i: x[i], dict(stacked)) for i in range(n)]


def _differences(column: Sequence[Any]) -> list[str]:
    """What keeps the adapters of one path, None where one has none, from being stacked."""
    lacking = [i for i, value in enumerate(column) if value is None]
    values = [value for value in column if value is not None]
    if lacking and not isinstance(values[0], LoraFactors):
        return [f"adapters {lacking} lack it, and it is trained whole by the others"]
    if lacking and values[0].magnitude is not None:
        return [f"adapters {lacking} lack it, and DoRA's magnitude of it comes from the base"]
    views: dict[str, Callable[[Any], Any]] = {"kinds": _kind}
    if all(isinstance(value, LoraFactors) for value in values):
        views |= {"axes": lambda f: tuple(f.axes), "dropout rates": lambda f: f.dropout}
    views["shapes of the weight"] = _weight_shape
    for what, view in views.items():
        seen = [None if value is None else view(value) for value in column]
        if len({x for x in seen if x is not None}) > 1:
            return [f"{what} {seen}"]
    return []


def _kind(value: Any) -> str:
    return "whole leaf" if not isinstance(value, LoraFactors) else "LoRA" if value.magnitude is None else "DoRA"


def _weight_shape(value: Any) -> tuple[int, ...]:
    """All sizes but the rank, in the order of batch, inputs, outputs."""
    if not isinstance(value, LoraFactors):
        return tuple(value.shape)
    return (*value.a.shape[:-1], *value.b.shape[len(value.axes.batch) + 1 :])


def _stacked(column: Sequence[Any]) -> Any:
    factors = [value for value in column if isinstance(value, LoraFactors)]
    if not factors:
        return _pile(column)
    first, rank = factors[0], max(f.rank for f in factors)
    scale = first.scale if len({f.scale for f in factors}) == 1 else 1.0
    nothing = dataclasses.replace(first, a=jnp.zeros_like(first.a), b=jnp.zeros_like(first.b), scale=scale)
    parts = [_padded(_rescaled(nothing if value is None else value, scale), rank) for value in column]
    magnitude = None if first.magnitude is None else _pile([f.magnitude for f in parts])
    a, b = _pile([f.a for f in parts]), _pile([f.b for f in parts])
    return LoraFactors(a, b, magnitude, scale, first.axes, first.dropout)


def _rescaled(f: LoraFactors, scale: float) -> LoraFactors:
    """The same update with another scale; the product is not rounded to a dtype narrower than float32."""
    if f.scale == scale:
        return f
    return dataclasses.replace(f, b=f.b.astype(accumulation_dtype(f.b.dtype)) * (f.scale / scale))


def _padded(f: LoraFactors, rank: int) -> LoraFactors:
    """The same update with a larger rank: A has more columns and B more rows, all of them zero."""

    def grown(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, rank - f.rank if i == axis else 0) for i in range(x.ndim)])

    return f if f.rank == rank else dataclasses.replace(f, a=grown(f.a, f.a.ndim - 1), b=grown(f.b, len(f.axes.batch)))


def _pile(arrays: Sequence[Any]) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(x.dtype for x in arrays))
    return jnp.stack([jnp.asarray(x, dtype) for x in arrays])


def _sizes(value: Any) -> set[int | None]:
    """The sizes of the leading axes of one path's arrays; None for factors with the axes of one weight alone."""
    if isinstance(value, LoraFactors) and value.a.ndim <= len(value.axes.batch) + len(value.axes.inputs) + 1:
        return {None}
    return {x.shape[0] if x.shape else None for x in jax.tree.leaves(value)}
