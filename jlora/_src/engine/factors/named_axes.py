"""Arrays whose axes have names, and their contraction: the arithmetic under every rule."""

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
"""The name of the rank axis."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """An array whose axes have names.

    For a part of a weight, each name is a dimension of the weight, or `RANK`. Along the dimensions that it does not
    name, it is constant.

    Attributes:
      array: one axis for each entry of ``dims``.
      dims: the name of each axis. Static.
    """

    array: Any
    dims: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    @property
    def sizes(self) -> dict[Any, int]:
        """The size of each axis, by name."""
        return dict(zip(self.dims, self.array.shape, strict=True))

    def axes(self, dims: Iterable[Hashable]) -> list[int]:
        """The positions of these axes."""
        return [self.dims.index(d) for d in dims]

    @property
    def spec(self) -> dict[Any, Any]:
        """The mesh axes of each axis, by name; None for each on a mesh without Explicit axes."""
        spec = compat.explicit_spec(self.array) or (None,) * self.array.ndim
        return dict(zip(self.dims, spec, strict=True))

    def apply(self, fn: Callable[[Any], Any]) -> NamedArray:
        """``fn(array)`` under the same names."""
        return NamedArray(fn(self.array), self.dims)

    def apply_along(self, dim: int, fn: Callable[[Array, int], Array]) -> NamedArray:
        """``fn(array, axis)`` under the same names if ``dim`` is one of them; else unchanged."""
        return NamedArray(fn(self.array, self.dims.index(dim)), self.dims) if dim in self.dims else self

    def rename(self, names: Mapping[int, int]) -> NamedArray:
        """The same array after the weight's dimensions moved, old to new. A missing one has size 1 and is dropped."""
        gone = [i for i, d in enumerate(self.dims) if d != RANK and d not in names]
        kept = tuple(d if d == RANK else names[d] for i, d in enumerate(self.dims) if i not in gone)
        return NamedArray(lax.squeeze(self.array, gone) if gone else self.array, kept)

    def transpose(self, dims: Sequence[Hashable]) -> Array:
        """The array with its axes in the order of ``dims``, a permutation of its own."""
        if list(dims) == list(self.dims):
            return self.array
        return lax.transpose(self.array, self.axes(dims))

    def sum(self, dims: Collection[Hashable]) -> NamedArray:
        """The sum over ``dims``."""
        if not dims:
            return self
        axes = [i for i, d in enumerate(self.dims) if d in dims]
        return NamedArray(jnp.sum(self.array, axes), tuple(d for d in self.dims if d not in dims))

    def expand(self, dims: Sequence[int], shape: Sequence[int]) -> NamedArray:
        """Broadcast along those of ``dims`` that it lacks, to the sizes in ``shape``."""
        new = [d for d in dims if d not in self.dims]
        if not new:
            return self
        sizes = (*(shape[d] for d in new), *self.array.shape)
        return NamedArray(lax.broadcast_in_dim(self.array, sizes, range(len(new), len(sizes))), (*new, *self.dims))

    def broadcast(self, dims: Sequence[Hashable], shape: Sequence[int]) -> Array:
        """The array with exactly the axes ``dims``, in this order, of sizes ``shape``."""
        own = [d for d in dims if d in self.dims]
        return lax.broadcast_in_dim(self.transpose(own), tuple(shape), [dims.index(d) for d in own])

    def times(self, other: NamedArray) -> NamedArray:
        """The product with an array whose axes are some of these.

        Stays in float32 or wider, and is rounded once, on meeting an activation.
        """
        order = [d for d in self.dims if d in other.dims]
        missing = [i for i, d in enumerate(self.dims) if d not in other.dims]
        array, factor = promote_arrays(self.array, jnp.expand_dims(other.transpose(order), missing))
        return NamedArray(array * factor, self.dims)


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which sums of ``dtype`` are accumulated: float32 or wider."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def promoted_dtype(*dtypes: Any) -> Any:
    """The dtype to which JAX promotes these, even in a program that forbids promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def low_rank_dtype(*dtypes: Any) -> Any:
    """The dtype in which a low-rank product of an activation and a weight of these dtypes runs: bfloat16 or wider.

    JAX's promotion decides, except that a float of 8 bits or less is too coarse for factors: any other float
    takes precedence over it.
    """
    given = {jnp.dtype(d) for d in dtypes}
    kept = [d for d in given if not (jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).bits <= 8)]
    if not any(jnp.issubdtype(d, jnp.inexact) for d in kept):
        kept.append(jnp.dtype(jnp.bfloat16))
    return promoted_dtype(*kept)


def promote_arrays(*arrays: Array) -> list[Array]:
    """``arrays`` in the memory space of the first, in one dtype that holds them all, float32 or wider."""
    dtype = accumulation_dtype(low_rank_dtype(*(x.dtype for x in arrays)))
    return [compat.to_memory_of(x, arrays[0]).astype(dtype) for x in arrays]


def concatenate(arrays: Sequence[Array], axis: int) -> Array:
    """``arrays`` concatenated along ``axis``, in a dtype that holds them all."""
    if len({x.dtype for x in arrays}) > 1:  # factors, some already multiplied: see `NamedArray.times`
        arrays = promote_arrays(*arrays)
    return jnp.concatenate(arrays, axis)


def contract(
    x: NamedArray,
    y: NamedArray,
    out: Sequence[Hashable],
    *,
    precision: Any = None,
    dtype: Any = None,
    spec: Mapping[Hashable, Any] | None = None,
    x_left: bool | None = None,
) -> NamedArray:
    """Sum the product of ``x`` and ``y`` over every name that is not in ``out``.

    One ``dot_general``, then a transpose if ``out`` needs one. The operands' order decides what XLA:CPU must transpose,
    so it is chosen to leave the largest array in place: the largest operand goes on the left if its summed axes are
    last, else on the right; if the result is the largest, the operand whose axes lead in ``out`` goes on the left. The
    sum is accumulated in float32 or wider and rounded once to ``dtype`` (by default, that of ``x``).

    Args:
      x, y: arrays of one dtype.
      out: the names of the result's axes, each of them an axis of ``x`` or ``y``.
      precision: as in `jax.lax.dot_general`.
      spec: on a mesh with Explicit axes, the mesh axes of each name in ``out``.
      x_left: whether ``x`` goes on the left; None to choose as described.
    """
    dtype = dtype or x.array.dtype
    x, y = _sum_lone_axes(x, y, out), _sum_lone_axes(y, x, out)
    if not (_x_goes_left(x, y, out) if x_left is None else x_left):
        x, y = y, x
    shared = [n for n in x.dims if n in y.dims]
    batch, summed = [n for n in shared if n in out], [n for n in shared if n not in out]
    dims = (*batch, *(n for v in (x, y) for n in v.dims if n not in shared))
    x, y = _match_batch_shardings(x, y, batch)
    sharding = None
    if spec is not None:
        sharding = NamedSharding(jax.typeof(x.array).sharding.mesh, PartitionSpec(*(spec[n] for n in dims)))
    result = lax.dot_general(
        x.array,
        y.array,
        ((x.axes(summed), y.axes(summed)), (x.axes(batch), y.axes(batch))),
        precision=precision,
        preferred_element_type=accumulation_dtype(x.array.dtype),
        out_sharding=sharding,
    )
    result = result.astype(dtype)
    if dims != tuple(out) and _size(result.shape) < max(_size(x.array.shape), _size(y.array.shape)):
        # XLA folds a transpose back into the product by exchanging its operands, which would undo the choice.
        result = lax.optimization_barrier(result)
    return NamedArray(NamedArray(result, dims).transpose(out), tuple(out))


def _x_goes_left(x: NamedArray, y: NamedArray, out: Sequence[Hashable]) -> bool:
    free = [sum(n not in other.dims for n in own.dims) for own, other in ((x, y), (y, x))]
    if x.array.dtype.itemsize < 4 and min(free) == 1 < max(free):
        return free[0] > 1  # XLA:CPU (to 0.12) cannot run bf16 x bf16 = f32 the other way round
    sizes = x.sizes | y.sizes
    x_size, y_size = _size(x.array.shape), _size(y.array.shape)
    if _size(sizes[n] for n in out) > max(x_size, y_size):
        leading = next((n for n in out if n not in x.dims or n not in y.dims), None)
        return leading in x.dims or leading is None
    largest = x if x_size >= y_size else y
    summed_last = bool(largest.dims) and largest.dims[-1] not in out
    return summed_last == (x_size >= y_size)


def _size(shape: Iterable[Any]) -> int:
    """The number of entries; a symbolic dimension (`jax.export`) counts as large."""
    return math.prod(n if isinstance(n, int) else 1 << 16 for n in shape)


def _match_batch_shardings(x: NamedArray, y: NamedArray, batch: Sequence[Hashable]) -> tuple[NamedArray, ...]:
    """``x`` and ``y``, on a mesh with Explicit axes, with their batch axes sharded alike."""
    specs = x.spec, y.spec
    both = {n: specs[0][n] or specs[1][n] for n in batch}
    return tuple(
        v.apply(functools.partial(compat.reshard, spec=(spec | both).values()))
        for v, spec in zip((x, y), specs, strict=True)
    )


def _sum_lone_axes(x: NamedArray, other: NamedArray, out: Collection[Hashable]) -> NamedArray:
    """``x`` summed over the axes absent from the other operand and the result."""
    return x.sum([n for n in x.dims if n not in other.dims and n not in out])
