"""Gathers of whole slices: embedding lookups, layers and experts picked by an index, and rows in a constant order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factors.factored import Factored
from jlora._src.engine.factors.named_axes import RANK, NamedArray, low_rank_dtype
from jlora._src.engine.factors.product import Product, chain
from jlora._src.engine.factors.stored import Stored
from jlora._src.engine.rules.low_rank import total
from jlora._src.engine.rules.rule import Decline
from jlora._src.engine.traced_weights import CONSTANT, NO_AXES, TracedWeight, Value, axes_of, weights_in
from jlora._src.types import Array, Axes, Use

IN_BOUNDS = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def gather(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Whole slices picked along some dimensions: an embedding lookup, or a layer or expert by its index."""
    weight, indices = args
    if isinstance(indices, Factored):
        raise Decline("the index is an adapted weight")
    picked = _picked_dims(eqn)
    weight = weight.to_memory_of(indices)
    base = _rows(eqn, weight.base, indices, picked)
    if weight.is_frozen:
        return [base]
    # For an index out of bounds, the base takes the fill value, the update is 0 and the multiplier 1.
    slices = weight.map_parts(
        base, lambda part: _gather_part(eqn, part, indices, picked, fill_value=int(part is weight.multiplier))
    )
    if all(d in weight.a.dims and d in weight.b.dims for d in picked):
        return [slices]
    if len(picked) == 1 and id(eqn) in scope.session.constant_gathers:
        return [dataclasses.replace(slices, constant_rows=True)]
    scope.record_factored(weight, eqn, 2 * weight.rank * base.size)
    return [_sum_rows(slices)]


def label_gather(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Slices picked by data are looked-up rows; those picked by a constant are a rearranged weight, if a product
    takes it."""
    table, index = values
    if isinstance(table, str) or any(w.adaptable for w in weights_in(index)):
        return walker.consume(eqn, values)
    try:
        picked = _picked_dims(eqn)
    except Decline as decline:
        reason = str(decline)
        return walker.consume(eqn, values, lambda *_: reason)
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval
    places = _places(eqn)
    one_index = all(n == 1 for i, n in enumerate(out.shape) if i not in places.values())
    sized = sum(shape[d] > 1 for d in places if d not in picked)
    source = walker.location.source_line(eqn)

    def pick(weight: TracedWeight) -> TracedWeight:
        rearranged = index == CONSTANT and len(picked) == 1 and not one_index
        dims = [weight.dims[picked[0]] if rearranged else NO_AXES] * out.ndim
        for d, i in places.items():
            dims[i] = NO_AXES if d in picked else weight.dims[d]
        axes = axes_of(weight, picked, ())
        is_row = isinstance(axes, Axes) and (sized == 1 or not one_index)
        lookup = Use("gather", axes, source) if is_row and isinstance(axes, Axes) else None
        return dataclasses.replace(weight, dims=tuple(dims), lookup=lookup)

    rows = tuple(map(pick, table))
    return [rows] if sized > 1 or index == CONSTANT else walker.consume(eqn, [rows, index])


def _rows(eqn: Any, base: Any, indices: Array, picked: list[int]) -> Array:
    """The slices of a base; of a stored one, only they are dequantized."""
    if not isinstance(base, Stored):
        return compat.bind(eqn, [base, indices])[0]
    if base.moves:
        return compat.bind(eqn, [base.dequantize(), indices])[0]
    columns = eqn.params["dimension_numbers"].start_index_map
    shape, last = base.shape, indices.ndim - 1
    inside = jnp.clip(indices, 0, jnp.array([shape[d] - 1 for d in columns], indices.dtype))

    def part(x: Array) -> Array:
        blocks = jnp.array([shape[d] // x.shape[d] for d in columns], indices.dtype)
        sizes = tuple(1 if d in picked else n for d, n in enumerate(x.shape))
        return compat.bind(eqn, [x, inside // blocks], slice_sizes=sizes, mode=lax.GatherScatterMode.CLIP)[0]

    rows = jax.tree.map(part, base.array).dequantize()
    if eqn.params["mode"] in IN_BOUNDS:
        return rows
    fill = jnp.nan if eqn.params["fill_value"] is None else eqn.params["fill_value"]
    lead = [i for i in range(rows.ndim) if i not in _places(eqn).values()]
    return jnp.where(lax.broadcast_in_dim(jnp.all(inside == indices, last), rows.shape, lead), rows, fill)


def _picked_dims(eqn: Any) -> list[int]:
    """The dimensions along which a gather picks single entries; along the others it takes whole slices.

    Raises:
      Decline: if it takes a part of another dimension.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    if numbers.operand_batching_dims:
        raise Decline("a batched gather has no factored form")
    picked = [d for d, size in enumerate(sizes) if size == 1 != shape[d] or d in numbers.collapsed_slice_dims]
    whole = [d for d in range(len(sizes)) if d not in picked]
    shifted = eqn.params["mode"] not in IN_BOUNDS and any(d in numbers.start_index_map for d in whole)
    if shifted or any(sizes[d] != shape[d] for d in whole):
        raise Decline("only whole slices can be gathered")
    return picked


def _places(eqn: Any) -> dict[int, int]:
    """Where each operand dimension ends up in the result, except the collapsed ones."""
    numbers = eqn.params["dimension_numbers"]
    kept = [d for d in range(len(eqn.params["slice_sizes"])) if d not in numbers.collapsed_slice_dims]
    return dict(zip(kept, numbers.offset_dims, strict=True))


def _gather_part(eqn: Any, part: NamedArray, indices: Array, picked: list[int], fill_value: int) -> NamedArray:
    """The slices of one part of a weight: the index dimensions, in front, replace the picked ones."""
    places = _places(eqn)
    own = [d for d in picked if d in part.dims]
    rest = [d for d in part.dims if d not in own]
    if not own:
        return part.rename(places)
    array = part.transpose([*own, *rest])
    columns = {d: i for i, d in enumerate(eqn.params["dimension_numbers"].start_index_map)}
    last = indices.ndim - 1
    index = lax.concatenate([lax.slice_in_dim(indices, columns[d], columns[d] + 1, axis=last) for d in own], last)
    leading = [i for i in range(eqn.outvars[0].aval.ndim) if i not in places.values()]
    numbers = lax.GatherDimensionNumbers(
        tuple(range(len(leading), len(leading) + len(rest))), tuple(range(len(own))), tuple(range(len(own)))
    )
    sizes = (1,) * len(own) + array.shape[len(own) :]
    mode = eqn.params["mode"]
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):  # keys have no fill value
        mode = lax.GatherScatterMode.CLIP
    array = lax.gather(array, index, numbers, sizes, mode=mode, fill_value=fill_value)
    return NamedArray(array, (*leading, *(d if d == RANK else places[d] for d in rest)))


def _sum_rows(rows: Factored) -> Array:
    """Looked-up rows as an array: results, not weights, so without dropout."""
    dims = tuple(range(len(rows.shape)))
    out = tuple(d for d in dims if d in rows.a.dims or d in rows.b.dims)
    a, b = (factor.array.astype(low_rank_dtype(rows.dtype)) for factor in (rows.a, rows.b))
    delta = chain([Product((rows.a.dims, rows.b.dims, out), last=True)], a, b)
    delta = NamedArray(delta, out).broadcast(dims, rows.shape)
    return total(NamedArray(rows.base, dims), delta, rows.multiplier)
