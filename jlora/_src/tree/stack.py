"""`stack` several adapters of one base along a new leading axis, for `jax.vmap`; `unstack` is the inverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.engine.factors.named_axes import accumulation_dtype
from jlora._src.tree.checks import check_kinds, differences
from jlora._src.types import Adapters, Array, LoraFactors, Path
from jlora.messages import bullets


def stack(adapters: Sequence[Adapters]) -> dict[Path, LoraFactors | Array]:
    """Several adapters of one base as one tree, stacked along a new leading axis.

    >>> both = jlora.stack([first, second])
    >>> logits = jax.vmap(lambda a: apply(jlora.attach(params, a), batch))(both)

    Each adapter keeps its update. Ranks are padded with zeros to the largest rank. If scales differ, they are folded
    into B, which is then float32 or wider, and the stacked scale is 1. An adapter that lacks a path gets zeros there.
    In training the padding stays zero, but a scale folded into B no longer scales its gradient: to train several scales
    in one stack, give the adapters one alpha and rank, and pass a ``strength`` for each to `attach`.

    Args:
      adapters: one or more, for the same params, as from `init`; or their shapes under `jax.eval_shape`.

    Returns:
      ``{path: LoraFactors | array}`` over all paths: ``a`` of shape ``[n, *batch, *inputs, rank]``, ``b`` of shape
      ``[n, *batch, rank, *outputs]``, ``magnitude`` of ``[n, *batch, *outputs]``, and whole leaves of ``[n, *shape]``.
      If dtypes differ, arrays are promoted.

    Raises:
      ValueError: listing every path whose adapters differ in kind, axes, shape or dropout rate, or that some adapters
        lack where zeros would change the model: leaves trained whole, and DoRA, whose magnitude comes from the base.
      TypeError: if a value is neither factors nor an array.
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
            f"one base that differ only in rank, scale and values.{_hint(wrong)}"
        )
    return {path: _stacked(column) for path, column in columns.items()}


def unstack(stacked: Adapters) -> list[dict[Path, LoraFactors | Array]]:
    """The adapters of a `stack`, as a list, with the stack's rank and scale: each keeps its update.

    >>> first, second = jlora.unstack(both)

    Raises:
      ValueError: listing every path whose arrays have no leading axis, or one of a different size.
      TypeError: if a value is neither factors nor an array.
    """
    n = stacked_size(stacked, "unstack")
    return [jax.tree.map(lambda x, i=i: x[i], dict(stacked)) for i in range(n)]


def stacked_size(stacked: Adapters, what: str) -> int:
    """The number of adapters in a stack; raises as `unstack` does."""
    check_kinds(stacked, what)
    sizes = {path: _sizes(value) for path, value in stacked.items()}
    every = [size for found in sizes.values() for size in found if size is not None]
    n = max(every, key=every.count, default=None)
    odd = {path: found for path, found in sizes.items() if None in found or found != {n}}
    if n is None or odd:
        wrong = (f"{p!r}: got {found - {None} or 'no such axis'}, expected {n or 'one'}" for p, found in odd.items())
        raise ValueError(
            f"{what}: these have no leading axis of one size:{bullets(wrong)}\nExpected the result of jlora.stack, or "
            "of jax.vmap over one."
        )
    return n


def _hint(wrong: Sequence[str]) -> str:
    """What to do about the differences."""
    text = ""
    if any(" lack it, " in line for line in wrong):
        text += (
            " Fill an adapter that lacks paths with fresh ones, which change nothing: {**jlora.init(key, params, "
            "plan), **adapters}, with the plan of the others."
        )
    if any(": kinds [" in line for line in wrong):
        text += " Train all of them with use_dora or none, and the same leaves whole; or serve each kind by itself."
    return text


def _differences(column: Sequence[Any]) -> list[str]:
    """Why the adapters of one path (None where one lacks it) cannot be stacked."""
    lacking = [i for i, value in enumerate(column) if value is None]
    values = [value for value in column if value is not None]
    if lacking and not isinstance(values[0], LoraFactors):
        return [f"adapters {lacking} lack it, and the others train it whole"]
    if lacking and values[0].magnitude is not None:
        return [f"adapters {lacking} lack it, and its DoRA magnitude comes from the base"]
    return differences(column)


def _stacked(column: Sequence[Any]) -> Any:
    factors = [value for value in column if isinstance(value, LoraFactors)]
    if not factors:
        return _stack_arrays(column)
    first, rank = factors[0], max(f.rank for f in factors)
    scale = first.scale if len({f.scale for f in factors}) == 1 else 1.0
    zero = dataclasses.replace(first, a=jnp.zeros_like(first.a), b=jnp.zeros_like(first.b), scale=scale)
    parts = [_padded(_rescaled(zero if value is None else value, scale), rank) for value in column]
    magnitude = None if first.magnitude is None else _stack_arrays([f.magnitude for f in parts])
    a, b = _stack_arrays([f.a for f in parts]), _stack_arrays([f.b for f in parts])
    return LoraFactors(a, b, magnitude, scale, first.axes, first.dropout)


def _rescaled(f: LoraFactors, scale: float) -> LoraFactors:
    """The same update with another scale, folded into B in float32 or wider."""
    if f.scale == scale:
        return f
    return dataclasses.replace(f, b=f.b.astype(accumulation_dtype(f.b.dtype)) * (f.scale / scale))


def _padded(f: LoraFactors, rank: int) -> LoraFactors:
    """The same update with a larger rank: A gets columns and B rows of zeros."""

    def grown(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, rank - f.rank if i == axis else 0) for i in range(x.ndim)])

    return f if f.rank == rank else dataclasses.replace(f, a=grown(f.a, f.a.ndim - 1), b=grown(f.b, len(f.axes.batch)))


def _stack_arrays(arrays: Sequence[Any]) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(x.dtype for x in arrays))
    return jnp.stack([jnp.asarray(x, dtype) for x in arrays])


def _sizes(value: Any) -> set[int | None]:
    """The sizes of the leading axes of one path's arrays; None for arrays that have no such axis."""
    if isinstance(value, LoraFactors) and value.a.ndim <= len(value.axes.batch) + len(value.axes.inputs) + 1:
        return {None}
    return {x.shape[0] if x.shape else None for x in jax.tree.leaves(value)}
