"""Rules that keep a weight factored through the primitives that consume it: products and lookups.

A rule takes ``(scope, eqn, args)``, where some of ``args`` are `Factored`, and returns the equation's
results. A rule that has no factored form for its case raises `Decline`; the interpreter then applies the
materialize policy. Rules that only move a weight about are in `moves`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factored import Factored, folded
from jlora._src.engine.named_axes import RANK, Leg, low_rank_dtype, transposed, wide, widened
from jlora._src.engine.product import Product, chain
from jlora._src.types import Array

Rule = Callable[[Any, Any, list[Any]], list[Any]]

IN_BOUNDS = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
NO_RAGGED_FORM = "only the ragged form [rows, inputs] x [groups, inputs, outputs] has a factored form"
NO_BATCH_GROUPS = "only the kernel of a convolution without batch groups has a factored form"
NO_KERNEL_GAIN = "a gain that learns, as by a norm, or DoRA's follows the axes that are summed"

SPLIT_GAIN = "a gain that learns, as by a norm, or DoRA's follows summed and kept dimensions at once"
JOINED = "DoRA, a gain that learns or active dropout on weights that are joined"


class Decline(Exception):  # noqa: N818 (not an error: it asks for the materialize policy)
    """A rule has no factored form for this case; the text says why."""


def dot_general(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Any contracting and batch dimensions, the weight on either side, used straight or transposed."""
    if all(isinstance(v, Factored) for v in args):
        smaller = min((0, 1), key=lambda i: (not args[i].is_row, not args[i].picked, math.prod(args[i].shape)))
        args[smaller] = scope.settle(args[smaller], eqn, "the other operand is an adapted weight too")
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    on_left = isinstance(args[0], Factored)
    weight, x = args if on_left else args[::-1]
    (wc, xc), (wb, xb) = ((lc, rc), (lb, rb)) if on_left else ((rc, lc), (rb, lb))
    weight = weight.beside(x)
    partner = dict(zip((*xc, *xb), (*wc, *wb), strict=True))
    x_names = [partner.get(i, ("x", i)) for i in range(x.ndim)]
    x_free = [n for i, n in enumerate(x_names) if i not in partner]
    w_free = [d for d in range(len(weight.shape)) if d not in (*wc, *wb)]
    out = [*wb, *w_free, *x_free] if on_left else [*wb, *x_free, *w_free]

    x, gain = _split_gain(weight, x, x_names, set(wc))
    y = compat.bind(eqn, [weight.base, x] if on_left else [x, weight.base])[0]
    delta = low_rank(scope, eqn, weight, x, x_names, out, summed=set(wc), y=y)
    return [_total(y, delta, gain, out)]


def ragged_dot_general(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Experts: rows of the left operand meet the group of the weight that they are assigned to."""
    x, weight, *rest = args
    if isinstance(x, Factored) or not is_standard_ragged(eqn):
        raise Decline(NO_RAGGED_FORM)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    weight = weight.beside(x)
    ((xc, wc), _), (group,) = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    (k,), (n,) = wc, [d for d in range(3) if d not in (*wc, group)]
    first, second = (weight.a, weight.b) if k in weight.a.dims else (weight.b, weight.a)
    if weight.gain is not None and k in weight.gain.dims:
        raise Decline(NO_KERNEL_GAIN)
    if n in first.dims or k in second.dims:
        raise Decline("the factors do not split into the contracted and the kept axes")
    rank = weight.rank
    groups, inputs, outputs = (weight.shape[d] for d in (group, k, n))
    # A row meets one group: one mask is enough.
    dropped = _adapter_input(scope, weight, x, [("x", i) for i in range(x.ndim)])
    a = first.spread([group, k, RANK], (groups, inputs, rank)).astype(dropped.dtype)
    b = second.spread([group, RANK, n], (groups, rank, outputs)).astype(dropped.dtype)
    rows = numbers.lhs_ragged_dimensions[0]
    standard = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))

    def product(left: Array, right: Array, dims: Any) -> Array:
        return lax.ragged_dot_general(
            left, right, *rest, ragged_dot_dimension_numbers=dims, precision=eqn.params["precision"]
        )

    (y,) = compat.bind(eqn, [x, weight.base, *rest])
    scope.factored(weight, eqn, 2 * rank * (x.size + y.size))
    hidden = product(transposed(dropped, (0, 1), (rows, *xc)), a, standard)
    gain = None
    if weight.gain is not None:  # that of each row's group
        table = weight.gain.spread([group, n], (groups, outputs))
        gain = Leg(jnp.repeat(table, rest[0], axis=0, total_repeat_length=y.shape[0]), (0, 1))
    return [_total(y, product(hidden, b, standard), gain, (0, 1))]


def is_standard_ragged(eqn: Any) -> bool:
    """Whether a ragged product is one of rows with the matrix of their group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    return len(numbers.rhs_group_dimensions) == 1 and not batch and len(contracted) == 1


def conv_general_dilated(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """A convolution with ``a`` to ``rank`` channels, then a 1x1 one with ``b``; any stride, dilation, groups."""
    x, weight = args
    p = eqn.params
    if isinstance(x, Factored) or p["batch_group_count"] != 1:
        raise Decline(NO_BATCH_GROUPS)
    _, w_spec, y_spec = p["dimension_numbers"]
    out, groups, rank = w_spec[0], p["feature_group_count"], weight.rank
    kernel_dims = [d for d in range(len(weight.shape)) if d != out]
    weight = weight.beside(x)
    first, second = (weight.a, weight.b) if out in weight.b.dims else (weight.b, weight.a)
    gained = [] if weight.gain is None else [d for d in weight.gain.dims if d != out]
    if gained:
        raise Decline(NO_KERNEL_GAIN)
    if out in first.dims or any(d in second.dims for d in kernel_dims):
        raise Decline("the factors do not split into the kernel's inputs and its output channels")
    (y,) = compat.bind(eqn, [x, weight.base])
    # The kernel's own layout, with the rank in the place of the output channels, once for each group.
    order = [RANK if d == out else d for d in range(len(weight.shape))]
    shape = [rank if d == RANK else weight.shape[d] for d in order]
    dropped = _adapter_input(scope, weight, x, [("x", i) for i in range(x.ndim)])
    kernel = first.spread(order, shape).astype(dropped.dtype)
    kernel = jnp.concatenate([kernel] * groups, axis=out)
    hidden = lax.conv_general_dilated(
        dropped,
        kernel,
        **{k: p[k] for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")},
        dimension_numbers=p["dimension_numbers"],
        feature_group_count=groups,
    )
    channel = y_spec[1]
    split = (*hidden.shape[:channel], groups, rank, *hidden.shape[channel + 1 :])
    names = [("y", i) for i in range(y.ndim)]
    h_names = [*names[:channel], "group", RANK, *names[channel + 1 :]]
    b = second.spread([RANK, out], (rank, weight.shape[out])).reshape(rank, groups, -1)
    y_names = [*names[:channel], "group", out, *names[channel + 1 :]]
    last = Product((tuple(h_names), (RANK, "group", out), tuple(y_names)), p["precision"], last=True)
    delta = chain([last], hidden.reshape(split), b).reshape(y.shape)
    scope.factored(weight, eqn, 2 * hidden.size * math.prod(shape) // rank + 2 * rank * y.size)
    names[channel] = out
    return [_total(y, delta, weight.gain, names)]


def gather(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Whole slices picked along some dimensions: an embedding lookup, or a layer or expert by its index."""
    weight, indices = args
    p = eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    if isinstance(indices, Factored):
        raise Decline("an adapted weight is the index")
    picked = picked_dims(eqn)
    weight = weight.beside(indices)
    (base,) = compat.bind(eqn, [weight.base, indices])
    lead = [i for i in range(base.ndim) if i not in numbers.offset_dims]
    kept = [d for d in range(len(sizes)) if d not in numbers.collapsed_slice_dims]
    place = dict(zip(kept, numbers.offset_dims, strict=True))
    columns = {d: i for i, d in enumerate(numbers.start_index_map)}

    def pick(leg: Leg) -> Leg:
        """The leg's own slices: its rows replaced by the dimensions of the indices, in front."""
        rows = [d for d in picked if d in leg.dims]
        rest = [d for d in leg.dims if d not in rows]
        if not rows:
            return leg.renamed(place)
        array = leg.ordered([*rows, *rest])
        at = indices.ndim - 1
        index = lax.concatenate([lax.slice_in_dim(indices, columns[d], columns[d] + 1, axis=at) for d in rows], at)
        shape = (1,) * len(rows) + array.shape[len(rows) :]
        dims = lax.GatherDimensionNumbers(
            tuple(range(len(lead), len(lead) + len(rest))), tuple(range(len(rows))), tuple(range(len(rows)))
        )
        # Where an index is out of bounds, the base has the fill value: the update is 0 there, and a gain 1.
        mode = lax.GatherScatterMode.CLIP if jnp.issubdtype(array.dtype, jax.dtypes.extended) else p["mode"]
        array = lax.gather(array, index, dims, shape, mode=mode, fill_value=int(leg is weight.gain))
        return Leg(array, (*lead, *(d if d == RANK else place[d] for d in rest)))

    looked_up = weight.with_legs(base, pick)
    if all(d in weight.a.dims and d in weight.b.dims for d in picked):
        return [looked_up]
    if len(picked) == 1 and id(eqn) in scope.session.constant:
        return [dataclasses.replace(looked_up, picked=True)]
    # A row of the table is a result: sum it now. Lookups are not dropped.
    dims = range(base.ndim)
    names = [d for d in dims if d in looked_up.a.dims or d in looked_up.b.dims]
    a, b = (leg.array.astype(low_rank_dtype(base.dtype)) for leg in (looked_up.a, looked_up.b))
    last = Product((looked_up.a.dims, looked_up.b.dims, tuple(names)), last=True)
    delta = Leg(chain([last], a, b), tuple(names)).spread(dims, base.shape)
    scope.factored(weight, eqn, 2 * weight.rank * base.size)
    return [_total(base, delta, looked_up.gain, dims)]


def picked_dims(eqn: Any) -> list[int]:
    """The dimensions along which a gather picks single entries; along the others it takes all.

    Raises:
      Decline: when it takes a part of another dimension.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    if numbers.operand_batching_dims:
        raise Decline("a batched gather has no factored form")
    picked = [d for d, size in enumerate(sizes) if size == 1 != shape[d] or d in numbers.collapsed_slice_dims]
    whole = [d for d in range(len(sizes)) if d not in picked]
    moved = eqn.params["mode"] not in IN_BOUNDS and any(d in numbers.start_index_map for d in whole)
    if moved or any(sizes[d] != shape[d] for d in whole):
        raise Decline("only whole slices can be gathered")
    return picked


def low_rank(
    scope: Any,
    eqn: Any,
    weight: Factored,
    x: Array,
    x_names: Sequence[Hashable],
    out: Sequence[Hashable],
    *,
    summed: set[int],
    y: Array,
) -> Array:
    """The weight's low-rank part contracted with ``x`` over ``summed``, as an array like ``y``.

    The factor that carries most of what is summed comes first: ``a`` in a straight use, ``b`` in a
    transposed one. Dimensions that both carry (a stack of matrices) are batch in the first product.
    """

    def share(leg: Leg, other: Leg) -> int:
        return math.prod(weight.shape[d] for d in summed if d in leg.dims and d not in other.dims)

    straight = share(weight.a, weight.b) >= share(weight.b, weight.a)
    first, second = (weight.a, weight.b) if straight else (weight.b, weight.a)
    early = {d for d in summed if d not in second.dims}
    hidden = [n for n in x_names if n not in early] + [d for d in first.dims if d not in x_names]
    names = [n for n in out if n in hidden or n in second.dims]
    dropped = _adapter_input(scope, weight, x, x_names)
    lone = [i for i, n in enumerate(x_names) if n in early and n not in first.dims]
    if lone:  # a summed dimension along which the update is constant
        dropped, x_names = jnp.sum(dropped, lone), [n for i, n in enumerate(x_names) if i not in lone]
    y_spec = compat.explicit_spec(y)
    early_specs = last_specs = None
    if y_spec is not None:
        x_spec, f_spec, s_spec = (
            compat.explicit_spec(v) or (None,) * v.ndim for v in (dropped, first.array, second.array)
        )
        known = dict(zip(first.dims, f_spec, strict=True)) | dict(zip(x_names, x_spec, strict=True))
        by_name = dict(zip(out, y_spec, strict=True))
        h_spec = tuple(by_name.get(n, known.get(n)) for n in hidden)
        early_specs = (x_spec, f_spec, h_spec)
        last_specs = (h_spec, s_spec, tuple(by_name[n] for n in names))
    precision = eqn.params["precision"]
    products = (
        Product((tuple(x_names), first.dims, tuple(hidden)), precision, early_specs),
        Product((tuple(hidden), second.dims, tuple(names)), precision, last_specs, last=True),
    )
    delta = chain(products, dropped, first.array, second.array)
    h_size = math.prod(_sizes(hidden, x_names, dropped.shape, first))
    inner = math.prod(weight.shape[d] for d in early)
    late = math.prod(weight.shape[d] for d in summed if d in second.dims)
    scope.factored(weight, eqn, 2 * h_size * inner + 2 * delta.size * weight.rank * late)
    if len(names) < len(out):
        delta = lax.broadcast_in_dim(delta, y.shape, [out.index(n) for n in names])
    return delta


def _sizes(names: Sequence[Hashable], x_names: Sequence[Hashable], x_shape: Sequence[int], leg: Leg) -> list[int]:
    sizes = dict(zip(leg.dims, leg.array.shape, strict=True)) | dict(zip(x_names, x_shape, strict=True))
    return [sizes[n] for n in names]


def _total(y: Array, delta: Array, gain: Leg | None, names: Sequence[Hashable]) -> Array:
    """``(y + delta) * gain`` in the dtype of ``y``, rounded once."""
    total = y.astype(wide(y.dtype)) + delta.astype(wide(y.dtype))
    if gain is not None:
        own = [n for n in names if n in gain.dims]
        spread = lax.broadcast_in_dim(gain.ordered(own), y.shape, [list(names).index(n) for n in own])
        total = total * spread.astype(total.dtype)
    return total.astype(y.dtype)


def _split_gain(weight: Factored, x: Array, x_names: Sequence[Hashable], summed: set[int]) -> tuple[Array, Leg | None]:
    """Where a DoRA gain acts: on ``x`` when its dimensions are summed, else on the result."""
    gain = weight.gain
    if gain is None or not summed & set(gain.dims):
        return x, gain
    if not all(d in x_names for d in gain.dims):
        raise Decline(SPLIT_GAIN)
    own = [n for n in x_names if n in gain.dims]
    spread = lax.broadcast_in_dim(gain.ordered(own), x.shape, [list(x_names).index(n) for n in own])
    dtype = low_rank_dtype(x.dtype, weight.dtype)
    x, spread = widened(x, spread)
    return (x * spread).astype(dtype), None


def _adapter_input(scope: Any, weight: Factored, x: Array, names: Sequence[Hashable]) -> Array:
    """``x`` as the low-rank product takes it: wide enough for the weight's dtype too, where the model mixes them
    (integers, one-hot booleans, float8), and with entries dropped at the weight's rate.

    There is a mask for each batch slice of the weight, for each of its uses, for each step of a loop around them, and
    inside ``shard_map`` for each device that has an ``x`` of its own.
    """
    x = x.astype(low_rank_dtype(x.dtype, weight.dtype))
    if weight.key is None:
        return x
    shared = [d for d in weight.key.dims if d in names]
    keys = weight.key.array
    for axis in reversed([i for i, d in enumerate(weight.key.dims) if d not in shared]):
        keys = lax.index_in_dim(keys, 0, axis, keepdims=False)
    keys = folded(keys, zlib.crc32(f"{weight.path}:{scope.session.next_mask(weight.path)}".encode()))
    for axis in sorted(compat.varying(x)):
        keys = folded(keys, lax.axis_index(axis))
    rest = [n for n in names if n not in shared]
    order = [*shared, *rest]
    shape = tuple(x.shape[list(names).index(n)] for n in order)

    def draw(key: Array) -> Array:
        return jax.random.bernoulli(key, 1 - weight.rate, shape[len(shared) :])

    for _ in shared:
        draw = jax.vmap(draw)
    mask = transposed(draw(keys), order, list(names))
    mask = compat.reshard(mask, compat.explicit_spec(x) or ())
    scaled = x / (1 - weight.rate)
    return jnp.where(mask, scaled, jnp.zeros_like(scaled)).astype(x.dtype)
