"""A factored weight: ``(base + a·b) * multiplier``, or its square, never summed."""

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
from jlora._src.engine.factors.named_axes import (
    RANK,
    NamedArray,
    accumulation_dtype,
    contract,
    low_rank_dtype,
    promote_arrays,
)
from jlora._src.engine.factors.split_inputs import split_inputs
from jlora._src.engine.factors.stored import Stored, array_like, dequantized
from jlora._src.quantized import QuantizedArray
from jlora._src.types import Array, Axes, LoraFactors, LoraWeight, Path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The value ``(base + sum_r a·b) * multiplier``, never summed.

    Attributes:
      base: the frozen part, with the value's shape and dtype.
      a, b: the factors; both name the batch dimensions and `RANK`. The scale is folded into ``b``.
      multiplier: None, or a factor on the sum: DoRA's ``magnitude / norm``, which names batch and output
        dimensions, or a trained scale in the model, such as the inverse norm of a normalized weight.
      key: None, or the dropout keys, named by the batch dimensions.
      rate: dropout rate. Static.
      path: the weight's, for messages. Static.
      constant_rows: whether it holds rows of a table picked by constant indices: a rearranged weight if a product
        takes them, else looked-up rows. Static.
      squared: whether this represents the elementwise square of the value, until summed. Static.
      nonzero: whether the multiplier is DoRA's alone, which is not zero: its gradient may then be computed from the
        product's result. At a magnitude of exactly 0 it is 0. Static.
    """

    base: Any
    a: NamedArray
    b: NamedArray
    multiplier: NamedArray | None = None
    key: NamedArray | None = None
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})
    path: Path = dataclasses.field(default="", metadata={"static": True})
    constant_rows: bool = dataclasses.field(default=False, metadata={"static": True})
    squared: bool = dataclasses.field(default=False, metadata={"static": True})
    nonzero: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def rank(self) -> int:
        return self.a.sizes[RANK]

    @property
    def is_frozen(self) -> bool:
        """Whether it has no update: a quantized weight that is not adapted."""
        return self.rank == 0

    @property
    def scheme(self) -> str:
        """Of a quantized base; "" for any other."""
        return self.base.array.scheme if isinstance(self.base, Stored) else ""

    @property
    def parts(self) -> dict[str, NamedArray]:
        """Its named arrays by field: the factors, and any multiplier and keys."""
        fields = {name: getattr(self, name) for name in ("a", "b", "multiplier", "key")}
        return {name: part for name, part in fields.items() if part is not None}

    @property
    def is_row(self) -> bool:
        """Whether only a single row or column of a weight is left, as after a lookup by one index or a mean: a result,
        not a weight."""
        pairs = ((self.a, self.b), (self.b, self.a))
        in_other = any(all(d in other.dims or self.shape[d] == 1 for d in one.dims) for one, other in pairs)
        return in_other and not self.is_frozen

    def map_parts(self, base: Any, fn: Callable[[NamedArray], NamedArray]) -> Factored:
        """This value with another base and ``fn`` applied to every part."""
        return dataclasses.replace(self, base=base, **{name: fn(part) for name, part in self.parts.items()})

    def map_smaller_factor(self, fn: Callable[[Any], Any]) -> Factored:
        """This value with a linear ``fn`` applied to its update, through the smaller factor."""
        name = self._smaller_factor
        return dataclasses.replace(self, **{name: getattr(self, name).apply(fn)})

    def rename_dims(self, base: Any, names: Mapping[int, int]) -> Factored:
        """This value with its dimensions renamed, old to new; see `NamedArray.rename`."""
        return self.map_parts(base, lambda part: part.rename(names))

    def to_memory_of(self, other: Any) -> Factored:
        """This value with its parts in the memory space of ``other``: the device's or the host's."""
        like = array_like(other)
        return self.map_parts(self.base, lambda part: part.apply(lambda x: compat.to_memory_of(x, like)))

    def factor_along(self, dims: Sequence[int]) -> tuple[str | None, Factored]:
        """The name of a factor that has all of ``dims``, and this value with it. If the whole update is constant
        along a dimension, either factor may have it. None when ``dims`` are divided between the two factors."""
        own = {d for d in dims if d in self.a.dims or d in self.b.dims}
        choices = ("b", "a") if dims else (self._smaller_factor,)
        name = next((n for n in choices if own <= set(getattr(self, n).dims)), None)
        if name is None:
            return None, self
        return name, dataclasses.replace(self, **{name: getattr(self, name).expand(dims, self.shape)})

    @property
    def _smaller_factor(self) -> str:
        return "b" if self.b.array.size <= self.a.array.size else "a"


def to_factored(weight: LoraWeight) -> Factored:
    """The interpreter's value for an attached weight. Scale and strength are folded into ``b``, in float32 at least:
    in bfloat16 a scale that is not a power of two would round every entry once more."""
    f = weight.factors
    batch, inputs, outputs = f.axes
    b = f.b
    if f.scale != 1.0 or weight.strength is not None:
        b = b.astype(accumulation_dtype(low_rank_dtype(b.dtype, weight.dtype)))
        strength = 1.0 if weight.strength is None else compat.to_memory_of(weight.strength, b).astype(b.dtype)
        b = b * (f.scale * strength)
    key = None
    if weight.dropout_key is not None and f.dropout > 0:
        key = NamedArray(_batch_keys(weight.dropout_key, f.axes.sizes(weight.shape)[0]), batch)
    value = Factored(
        base=Stored(weight.base) if isinstance(weight.base, QuantizedArray) else weight.base,
        a=NamedArray(f.a, (*batch, *inputs, RANK)),
        b=NamedArray(b, (*batch, RANK, *outputs)),
        key=key,
        rate=f.dropout,
        path=weight.path,
    )
    if f.magnitude is None:
        return value
    norm = lax.stop_gradient(column_norm(value, f.axes, split_inputs(weight)))
    norm, magnitude = promote_arrays(norm, f.magnitude)
    return dataclasses.replace(value, multiplier=NamedArray(magnitude / norm, (*batch, *outputs)), nonzero=True)


def frozen(array: QuantizedArray, path: Path) -> Factored:
    """The interpreter's value for a quantized weight that is not adapted: it has no update."""
    none = NamedArray(jnp.zeros(0, jnp.float32), (RANK,))
    return Factored(Stored(jax.tree.map(lax.stop_gradient, array)), none, none, path=path)


def column_norm(value: Factored, axes: Axes, mesh_axes: tuple[str, ...] = ()) -> Array:
    """The norm of ``base + a·b`` over the input axes, float32, of shape ``batch + outputs``.

    DoRA divides by it (Liu et al. 2024, eq. 5). Inside ``shard_map``, the inputs may be split over ``mesh_axes``.
    """
    square = square_sum(value, (*axes.batch, *axes.outputs))
    if mesh_axes:
        square = lax.psum(square, mesh_axes)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))


def square_sum(value: Factored, out: Sequence[int]) -> Array:
    """The sum of the squares of ``base + a·b`` over every dimension not in ``out``: float32, with axes in the
    order of ``out``. One factor has all of ``out``.

    Expanded as ``|W|² + 2 W·ab + |ab|²``, so that neither the sum nor its gradient is ever formed.
    """
    dims = tuple(range(len(value.shape)))
    parts = (value.a, value.b) if set(out) <= set(value.b.dims) else (value.b, value.a)
    base, x, y = (
        part.apply(lambda array: compat.to_device(array).astype(jnp.float32))
        for part in (NamedArray(dequantized(value.base), dims), *parts)
    )
    other = "other rank"
    x_other, y_other = (NamedArray(v.array, tuple(other if d == RANK else d for d in v.dims)) for v in (x, y))
    shared = [d for d in x.dims if d in y.dims and d != RANK]
    cross = contract(x, base, y.dims).array
    gram = contract(x, x_other, (*shared, RANK, other))
    square = contract(gram, y_other, y.dims).array
    summed = [d for d in dims if d not in out]
    constant = math.prod(value.shape[d] for d in summed if d not in x.dims and d not in y.dims)
    # Multiplied and summed, as XLA:CPU would transpose the weight for a product that is contracted once more.
    update = NamedArray(y.array * (2 * cross + constant * square), y.dims).sum({*y.dims} - {*out})
    own = base.apply(jnp.square).sum(summed)
    return jnp.maximum(own.transpose(out) + update.transpose(out), 0)


def materialize(value: Factored) -> Array:
    """The value summed in float32 and rounded once to its dtype, in its base's memory space, without dropout."""
    dims, given = range(len(value.shape)), array_like(value.base)
    if value.is_frozen and value.multiplier is None and not value.squared:
        return dequantized(value.base)
    value = dataclasses.replace(value, base=dequantized(value.base))
    value = jax.tree.map(compat.to_device, value)
    dtype = accumulation_dtype(value.dtype)
    out = [d for d in dims if d in value.a.dims or d in value.b.dims]
    a, b = (factor.apply(lambda x: x.astype(dtype)) for factor in (value.a, value.b))
    total = value.base.astype(dtype) + contract(a, b, out).broadcast(dims, value.shape)
    if value.multiplier is not None:
        total = total * value.multiplier.broadcast(dims, value.shape).astype(dtype)
    if value.squared:
        total = jnp.square(total)
    return compat.to_memory_of(total.astype(value.dtype), given)


def check_fit(shape: tuple[int, ...], f: LoraFactors) -> str | None:
    """Why factors do not fit a weight of ``shape``; None if they do."""
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


def fold_in(keys: Array, data: Any) -> Array:
    """`jax.random.fold_in` for keys of any shape."""
    fold = jax.random.fold_in
    for _ in range(keys.ndim):
        fold = jax.vmap(fold, (0, None))
    return fold(keys, data)


def _batch_keys(key: Array, batch: tuple[int, ...]) -> Array:
    """One key per batch slice, so that scanned layers and experts drop different entries."""
    if not batch:
        return key
    n = int(np.prod(batch))
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n)).reshape(batch)
