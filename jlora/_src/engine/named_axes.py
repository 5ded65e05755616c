"""Arrays whose axes have names, and their contraction: the arithmetic under every factored rule."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._src.engine import compat
from jlora._src.types import Array

RANK = -1
"""The name of the rank axis; every other axis of a `Leg` is named by the dimension that it follows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leg:
    """An array that follows some dimensions of a value and is constant along the others.

    Attributes:
      array: one axis for each entry of ``dims``.
      dims: for each axis, the value's dimension that it follows, or `RANK`. Static.
    """

    array: Any
    dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def along(self, dim: int, fn: Callable[[Array, int], Array]) -> Leg:
        """This leg with ``fn(array, axis)`` applied, if it follows ``dim``."""
        return Leg(fn(self.array, self.dims.index(dim)), self.dims) if dim in self.dims else self

    def renamed(self, names: Mapping[int, int]) -> Leg:
        """This leg after its value's dimensions moved: old to new; a missing one, of size 1, is dropped."""
        gone = [i for i, d in enumerate(self.dims) if d != RANK and d not in names]
        kept = tuple(d if d == RANK else names[d] for i, d in enumerate(self.dims) if i not in gone)
        return Leg(lax.squeeze(self.array, gone) if gone else self.array, kept)

    def ordered(self, dims: Sequence[Hashable]) -> Array:
        """The array with its axes in the order of ``dims``, which must be the leg's own, permuted."""
        return transposed(self.array, self.dims, dims)

    def spread(self, dims: Sequence[int], shape: Sequence[int]) -> Array:
        """The array with an axis for each of ``dims``, of the sizes ``shape`` where it was constant."""
        own = [d for d in dims if d in self.dims]
        return lax.broadcast_in_dim(self.ordered(own), tuple(shape), [dims.index(d) for d in own])

    def times(self, factor: Any, dims: Sequence[int]) -> Leg:
        """This leg multiplied by an array whose axes follow ``dims``, each of them the leg's own.

        The product is kept in float32 at least: it is rounded once, where an activation meets it.
        """
        order = [d for d in self.dims if d in dims]
        factor = jnp.expand_dims(transposed(factor, dims, order), [i for i, d in enumerate(self.dims) if d not in dims])
        array, factor = widened(self.array, factor)
        return Leg(array * factor, self.dims)


def wide(dtype: Any) -> Any:
    """The dtype in which sums of ``dtype`` are accumulated: float32 at least."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def promoted(*dtypes: Any) -> Any:
    """The dtype to which JAX promotes these, also in a program that allows no promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def low_rank_dtype(*dtypes: Any) -> Any:
    """The dtype in which a low-rank product of an activation and a weight of these dtypes runs: bfloat16 at least.

    It is the one to which JAX promotes them. A float of 8 bits or less has too few digits for factors, and gives way
    to any other float.
    """
    met = {jnp.dtype(d) for d in dtypes}
    kept = [d for d in met if not (jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).bits <= 8)]
    if not any(jnp.issubdtype(d, jnp.inexact) for d in kept):
        kept.append(jnp.dtype(jnp.bfloat16))
    return promoted(*kept)


def widened(*arrays: Array) -> list[Array]:
    """``arrays`` in the one dtype, float32 at least, and the one memory in which they are multiplied."""
    dtype = wide(low_rank_dtype(*(x.dtype for x in arrays)))
    return [compat.beside(x, arrays[0]).astype(dtype) for x in arrays]


def joined(arrays: Sequence[Array], axis: int) -> Array:
    """``arrays`` one after the other along ``axis``, in a dtype that holds them all."""
    if len({x.dtype for x in arrays}) > 1:  # factors, of which some were multiplied: see `Leg.times`
        arrays = widened(*arrays)
    return jnp.concatenate(arrays, axis)


def transposed(x: Array, names: Sequence[Hashable], order: Sequence[Hashable]) -> Array:
    """``x``, whose axes are ``names``, with its axes in ``order``."""
    return x if list(names) == list(order) else lax.transpose(x, [list(names).index(n) for n in order])


def contract(
    x: Array,
    x_names: Sequence[Hashable],
    y: Array,
    y_names: Sequence[Hashable],
    out: Sequence[Hashable],
    *,
    precision: Any = None,
    dtype: Any = None,
    spec: Mapping[Hashable, Any] | None = None,
) -> Array:
    """Sum the product of ``x`` and ``y`` over every name that is not in ``out``.

    One ``dot_general``, then a transpose if ``out`` asks for one. The operands' order decides what XLA:CPU
    has to transpose, so it is chosen to leave the largest array as it lies: the largest operand stands on
    the left when its summed axes come last, else on the right; where the result is the largest, the
    operand whose axes lead in ``out`` stands on the left. The sum is accumulated in at least float32 and
    rounded once to ``dtype`` (by default, that of ``x``).

    Args:
      x, y: arrays of one dtype, with axes ``x_names`` and ``y_names``.
      out: the names of the result's axes, each of them an axis of ``x`` or ``y``.
      precision: as in `jax.lax.dot_general`.
      spec: on a mesh with Explicit axes, the mesh axes of each name in ``out``.
    """
    dtype = dtype or x.dtype
    x, x_names = _sum_out(x, x_names, y_names, out)
    y, y_names = _sum_out(y, y_names, x_names, out)
    if not _x_goes_left(x, x_names, y, y_names, out):
        x, x_names, y, y_names = y, y_names, x, x_names
    shared = [n for n in x_names if n in y_names]
    batch = [n for n in shared if n in out]
    summed = [n for n in shared if n not in out]
    names = batch + [n for n in x_names if n not in shared] + [n for n in y_names if n not in shared]
    x, y = _alike(x, x_names, y, y_names, batch)
    sharding = None
    if spec is not None:
        sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*(spec[n] for n in names)))
    result = lax.dot_general(
        x,
        y,
        (
            ([x_names.index(n) for n in summed], [y_names.index(n) for n in summed]),
            ([x_names.index(n) for n in batch], [y_names.index(n) for n in batch]),
        ),
        precision=precision,
        preferred_element_type=wide(x.dtype),
        out_sharding=sharding,
    )
    result = result.astype(dtype)
    if names != list(out) and _size(result.shape) < max(_size(x.shape), _size(y.shape)):
        # XLA folds a transpose back into the product by exchanging its operands, which would undo the choice.
        result = lax.optimization_barrier(result)
    return transposed(result, names, out)


def _x_goes_left(x: Array, x_names: list[Hashable], y: Array, y_names: list[Hashable], out: Sequence[Hashable]) -> bool:
    free = [sum(n not in others for n in own) for own, others in ((x_names, y_names), (y_names, x_names))]
    if x.dtype.itemsize < 4 and min(free) == 1 < max(free):
        return free[0] > 1  # XLA:CPU (to 0.12) cannot run bf16 x bf16 = f32 the other way round
    sizes = dict(zip(x_names, x.shape, strict=True)) | dict(zip(y_names, y.shape, strict=True))
    x_size, y_size = _size(x.shape), _size(y.shape)
    if _size(sizes[n] for n in out) > max(x_size, y_size):
        leading = next((n for n in out if n not in x_names or n not in y_names), None)
        return leading in x_names or leading is None
    names = x_names if x_size >= y_size else y_names
    summed_last = bool(names) and names[-1] not in out
    return summed_last == (x_size >= y_size)


def _size(shape: Iterable[Any]) -> int:
    """The number of entries; a dimension that is a symbol, as in `jax.export`, counts as a large one."""
    return math.prod(n if isinstance(n, int) else 1 << 16 for n in shape)


def _alike(x: Array, x_names: list[Hashable], y: Array, y_names: list[Hashable], batch: list[Hashable]):
    """``x`` and ``y``, on a mesh with Explicit axes, with their batch axes sharded as either of them is."""
    x_spec, y_spec = (compat.explicit_spec(v) or (None,) * v.ndim for v in (x, y))
    x_by, y_by = dict(zip(x_names, x_spec, strict=True)), dict(zip(y_names, y_spec, strict=True))
    both = {n: x_by[n] or y_by[n] for n in batch}
    return tuple(compat.reshard(v, (by | both).values()) for v, by in ((x, x_by), (y, y_by)))


def _sum_out(
    x: Array, names: Sequence[Hashable], others: Collection[Hashable], out: Collection[Hashable]
) -> tuple[Array, list[Hashable]]:
    """``x`` summed over the names that neither the other operand nor the result has."""
    lone = [i for i, n in enumerate(names) if n not in others and n not in out]
    kept = [n for i, n in enumerate(names) if i not in lone]
    return (jnp.sum(x, lone) if lone else x), kept
