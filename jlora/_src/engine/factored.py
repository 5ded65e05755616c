"""A weight that is kept factored: ``(base + a·b) * gain``, or its square, as the interpreter carries it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.named_axes import RANK, Leg, contract, low_rank_dtype, wide, widened
from jlora._src.types import Array, Axes, LoraFactors, LoraWeight, Path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The value ``(base + sum_r a·b) * gain``, never summed.

    Attributes:
      base: the frozen part, of the value's shape and dtype.
      a, b: the low-rank part; both follow the batch dimensions and `RANK`. The scale is in ``b``.
      gain: None, or what multiplies the sum: DoRA's ``magnitude / norm``, which follows batch and output dimensions,
        or a factor in the model that learns, such as the inverse norm of a weight that is normalized.
      key: None, or the dropout keys, which follow the batch dimensions.
      rate: dropout rate. Static.
      path: of the weight, for messages. Static.
      picked: whether it is rows of a table picked by constant indices: a rearranged weight where a product takes
        them, else rows that are looked up. Static.
      squared: whether this stands for the square of the value, entry by entry, on its way to a sum. Static.
    """

    base: Any
    a: Leg
    b: Leg
    gain: Leg | None = None
    key: Leg | None = None
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})
    path: Path = dataclasses.field(default="", metadata={"static": True})
    picked: bool = dataclasses.field(default=False, metadata={"static": True})
    squared: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def rank(self) -> int:
        return self.a.array.shape[self.a.dims.index(RANK)]

    @property
    def is_row(self) -> bool:
        """Whether a single row or column of a weight is left, as of a lookup by one index, or a mean: a result, and
        no weight."""
        pairs = ((self.a, self.b), (self.b, self.a))
        return any(all(d in other.dims or self.shape[d] == 1 for d in one.dims) for one, other in pairs)

    @property
    def smaller(self) -> str:
        """The name of the smaller factor, which takes a scalar."""
        return "b" if self.b.array.size <= self.a.array.size else "a"

    def with_legs(self, base: Any, fn: Callable[[Leg], Leg]) -> Factored:
        """This value with another base and ``fn`` applied to every leg."""
        optional = {n: None if (leg := getattr(self, n)) is None else fn(leg) for n in ("gain", "key")}
        return dataclasses.replace(self, base=base, a=fn(self.a), b=fn(self.b), **optional)

    def beside(self, other: Any) -> Factored:
        """This value with its legs in the memory, the device's or the host's, in which ``other`` lies."""
        return self.with_legs(self.base, lambda leg: Leg(compat.beside(leg.array, other), leg.dims))

    def with_b(self, array: Any) -> Factored:
        """This value with another array for ``b``."""
        return dataclasses.replace(self, b=Leg(array, self.b.dims))

    def renamed(self, base: Any, names: Mapping[int, int]) -> Factored:
        """This value with its dimensions renamed, old to new; see `Leg.renamed`."""
        return self.with_legs(base, lambda leg: leg.renamed(names))


def factored(weight: LoraWeight) -> Factored:
    """The interpreter's value for an attached weight; scale and strength are folded into ``b``, in float32 at least:
    in bfloat16 a scale that is no power of two would round every entry once more."""
    f = weight.factors
    batch, inputs, outputs = f.axes
    b = f.b
    if f.scale != 1.0 or weight.strength is not None:
        b = b.astype(wide(low_rank_dtype(b.dtype, weight.dtype)))
        strength = 1.0 if weight.strength is None else compat.beside(weight.strength, b).astype(b.dtype)
        b = b * (f.scale * strength)
    key = None
    if weight.dropout_key is not None and f.dropout > 0:
        key = Leg(_batch_keys(weight.dropout_key, f.axes.sizes(weight.shape)[0]), batch)
    value = Factored(
        base=weight.base,
        a=Leg(f.a, (*batch, *inputs, RANK)),
        b=Leg(b, (*batch, RANK, *outputs)),
        key=key,
        rate=f.dropout,
        path=weight.path,
    )
    if f.magnitude is None:
        return value
    norm, magnitude = widened(lax.stop_gradient(column_norm(value, f.axes)), f.magnitude)
    return dataclasses.replace(value, gain=Leg(magnitude / norm, (*batch, *outputs)))


def column_norm(value: Factored, axes: Axes) -> Array:
    """The norm of ``base + a·b`` over the input axes, float32, of shape ``batch + outputs``.

    It is what DoRA divides by (Liu et al. 2024, eq. 5).
    """
    square = square_sum(value, (*axes.batch, *axes.outputs))
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))


def square_sum(value: Factored, names: Sequence[int]) -> Array:
    """The sum of the squares of ``base + a·b`` over every dimension that is not in ``names``: float32, its axes in the
    order of ``names``, all of which one factor follows.

    Expanded as ``|W|² + 2 W·ab + |ab|²``, so that neither the sum nor its gradient is ever formed.
    """
    dims = range(len(value.shape))
    legs = (value.a, value.b)
    first, last = legs if set(names) <= set(value.b.dims) else legs[::-1]
    base, x, y = (compat.on_device(v).astype(jnp.float32) for v in (value.base, first.array, last.array))
    other = "other rank"
    x_other, y_other = ([other if d == RANK else d for d in leg.dims] for leg in (first, last))
    shared = [d for d in first.dims if d in last.dims and d != RANK]
    cross = contract(contract(x, first.dims, base, dims, last.dims), last.dims, y, last.dims, names)
    gram = contract(x, first.dims, x, x_other, (*shared, RANK, other))
    square = contract(contract(gram, (*shared, RANK, other), y, last.dims, y_other), y_other, y, y_other, names)
    summed, kept = [d for d in dims if d not in names], sorted(names)
    constant = math.prod(value.shape[d] for d in summed if d not in first.dims and d not in last.dims)
    own = jnp.sum(jnp.square(base), summed).transpose([kept.index(d) for d in names])
    return jnp.maximum(own + 2 * cross + constant * square, 0)


def dense(value: Factored) -> Array:
    """The value summed in float32 and rounded once to its dtype, in the memory of its base. Without dropout."""
    dims, given = range(len(value.shape)), value.base
    value = jax.tree.map(compat.on_device, value)
    dtype = wide(value.dtype)
    names = [d for d in dims if d in value.a.dims or d in value.b.dims]
    a, b = (leg.array.astype(dtype) for leg in (value.a, value.b))
    delta = Leg(contract(a, value.a.dims, b, value.b.dims, names), tuple(names))
    total = value.base.astype(dtype) + delta.spread(dims, value.shape)
    if value.gain is not None:
        total = total * value.gain.spread(dims, value.shape).astype(dtype)
    if value.squared:
        total = jnp.square(total)
    return compat.beside(total.astype(value.dtype), given)


def check_fit(shape: tuple[int, ...], f: LoraFactors) -> str | None:
    """What is wrong when factors do not fit a weight of ``shape``; None when they do."""
    if sorted(sum(f.axes, ())) != list(range(len(shape))):
        return f"axes {tuple(f.axes)} do not name each axis of shape {shape} once"
    batch, inputs, outputs = f.axes.sizes(shape)
    rank = f.a.shape[-1] if f.a.ndim else 0
    expected = {"a": (*batch, *inputs, rank), "b": (*batch, rank, *outputs), "magnitude": (*batch, *outputs)}
    wrong = [
        f"{name} has shape {tuple(leaf.shape)}, expected {expected[name]}"
        for name in expected
        if (leaf := getattr(f, name)) is not None and tuple(leaf.shape) != expected[name]
    ]
    return f"weight of shape {shape}: {'; '.join(wrong)}" if wrong else None


def _batch_keys(key: Array, batch: tuple[int, ...]) -> Array:
    """A key for each batch slice: scanned layers and experts drop different entries."""
    if not batch:
        return key
    n = int(np.prod(batch))
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n)).reshape(batch)


def folded(keys: Array, data: Any) -> Array:
    """Keys of any shape, each with the integer ``data`` folded in."""
    fold = jax.random.fold_in
    for _ in range(keys.ndim):
        fold = jax.vmap(fold, (0, None))
    return fold(keys, data)
