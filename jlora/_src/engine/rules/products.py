"""Products with weights: ``dot_general``, ``ragged_dot_general`` and convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factors.adapted_product import Dot
from jlora._src.engine.factors.factored import Factored
from jlora._src.engine.factors.named_axes import RANK, NamedArray, low_rank_dtype, promote_arrays
from jlora._src.engine.factors.product import Product, chain
from jlora._src.engine.factors.stored import with_base
from jlora._src.engine.observation import observe
from jlora._src.engine.rules.low_rank import adapted, adapter_input, total
from jlora._src.engine.rules.rule import Decline
from jlora._src.engine.traced_weights import (
    DATA,
    MatrixUse,
    Requirement,
    TracedWeight,
    Value,
    axes_of,
    is_data,
    weights_in,
)
from jlora._src.types import Array, Axes

NO_RAGGED_FORM = "only the ragged product [rows, inputs] x [groups, inputs, outputs] has a factored form"
NO_BATCH_GROUPS = "only the kernel of a convolution without batch groups has a factored form"
MIXED_RAGGED_FACTORS = "the factors do not split into the contracted and the kept axes"
MIXED_KERNEL_FACTORS = "the factors do not split into the kernel's inputs and its output channels"
MULTIPLIED_INPUTS = "the multiplier (DoRA's, or a trained one such as a norm) follows the axes that are summed"
MIXED_MULTIPLIER = "the multiplier (DoRA's, or a trained one such as a norm) follows summed and kept dimensions at once"
TWO_WEIGHTS = "the other operand is an adapted weight too"


def dot_general(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Any contracting and batch dimensions; the weight on either side, straight or transposed."""
    if all(isinstance(v, Factored) for v in args):
        smaller = min((0, 1), key=lambda i: (not args[i].is_row, not args[i].constant_rows, math.prod(args[i].shape)))
        args[smaller] = scope.materialize(args[smaller], eqn, TWO_WEIGHTS)
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    on_left = isinstance(args[0], Factored)
    weight, x = args if on_left else args[::-1]
    (wc, xc), (wb, xb) = ((lc, rc), (lb, rb)) if on_left else ((rc, lc), (rb, lb))
    weight = weight.to_memory_of(x)
    partner = dict(zip((*xc, *xb), (*wc, *wb), strict=True))
    x = NamedArray(x, tuple(partner.get(i, ("x", i)) for i in range(x.ndim)))
    x_free = [n for i, n in enumerate(x.dims) if i not in partner]
    w_free = [d for d in range(len(weight.shape)) if d not in (*wc, *wb)]
    out = (*wb, *w_free, *x_free) if on_left else (*wb, *x_free, *w_free)

    x, multiplier = _multiply_inputs(weight, x, set(wc))
    dot = Dot(tuple(eqn.params.items()), on_left)
    return [adapted(scope, eqn, weight, x, dot, out, set(wc), multiplier)]


def label_dot_general(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    sizes = [atom.aval.size for atom in eqn.invars]
    smaller = min((0, 1), key=lambda i: sizes[i])

    def use(i: int, weight: TracedWeight) -> MatrixUse | str:
        other = values[1 - i]
        axes = axes_of(weight, contracted[i], batch[i])
        if isinstance(axes, str):
            return axes
        if weight.lookup and not is_data(other):
            return "a row of it is multiplied by another weight"
        work = _work(eqn, i, contracted[i]) if other == DATA else 0
        if i == smaller and any(w.is_matrix for w in weights_in(other)):
            return MatrixUse(axes, work, materialized=TWO_WEIGHTS)
        kept = weight.axes_along([d for d in range(len(weight.dims)) if d not in (*contracted[i], *batch[i])])
        multiplied = weight.multiplier_axes
        mixed = multiplied and multiplied & {*axes.inputs} and multiplied & kept
        return MatrixUse(axes, work, materialized=MIXED_MULTIPLIER if mixed else "")

    return walker.consume(eqn, values, use)


def _multiply_inputs(weight: Factored, x: NamedArray, summed: set[int]) -> tuple[NamedArray, NamedArray | None]:
    """``(x, multiplier of the result)``: a multiplier along summed dimensions is multiplied into ``x`` instead."""
    multiplier = weight.multiplier
    if multiplier is None or not summed & set(multiplier.dims):
        return x, multiplier
    if not all(d in x.dims for d in multiplier.dims):
        raise Decline(MIXED_MULTIPLIER)
    dtype = low_rank_dtype(x.array.dtype, weight.dtype)
    array, factor = promote_arrays(x.array, multiplier.broadcast(x.dims, x.array.shape))
    return NamedArray((array * factor).astype(dtype), x.dims), None


def ragged_dot_general(scope: Any, eqn: Any, args: list[Any]) -> list[Any]:
    """Experts: each row of the left operand is multiplied by the weight of its group."""
    x, weight, *rest = args
    if isinstance(x, Factored) or not _is_standard_ragged(eqn):
        raise Decline(NO_RAGGED_FORM)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    weight = weight.to_memory_of(x)
    ((xc, wc), _), (group,) = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    (k,), (n,) = wc, [d for d in range(3) if d not in (*wc, group)]
    first, second = (weight.a, weight.b) if k in weight.a.dims else (weight.b, weight.a)
    if weight.multiplier is not None and k in weight.multiplier.dims:
        raise Decline(MULTIPLIED_INPUTS)
    if n in first.dims or k in second.dims:
        raise Decline(MIXED_RAGGED_FACTORS)
    rank = weight.rank
    groups, inputs, outputs = (weight.shape[d] for d in (group, k, n))
    # Each row belongs to one group, so one mask is enough.
    dropped = adapter_input(scope, weight, NamedArray(x, ("x0", "x1")))
    a = first.broadcast([group, k, RANK], (groups, inputs, rank)).astype(dropped.array.dtype)
    b = second.broadcast([group, RANK, n], (groups, rank, outputs)).astype(dropped.array.dtype)
    standard = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))

    def product(left: Array, right: Array) -> Array:
        return lax.ragged_dot_general(
            left, right, *rest, ragged_dot_dimension_numbers=standard, precision=eqn.params["precision"]
        )

    y = with_base(weight.base, lambda base, x, *rest: compat.bind(eqn, [x, base, *rest])[0], x, *rest)
    if weight.is_frozen:
        return [y]
    scope.record_factored(weight, eqn, 2 * rank * (x.size + y.size))
    rows = numbers.lhs_ragged_dimensions[0]
    hidden = product(dropped.transpose([f"x{d}" for d in (rows, *xc)]), a)
    if (observation := scope.session.observation) is not None:
        return [observe(y, hidden, observation)]
    multiplier = None
    if weight.multiplier is not None:  # the multiplier of each row's group
        table = weight.multiplier.broadcast([group, n], (groups, outputs))
        multiplier = NamedArray(jnp.repeat(table, rest[0], axis=0, total_repeat_length=y.shape[0]), (0, 1))
    return [total(NamedArray(y, (0, 1)), product(hidden, b), multiplier, nonzero=weight.nonzero)]


def label_ragged_dot_general(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    groups = ((), (*batch[1], *numbers.rhs_group_dimensions))
    no_form = "" if _is_standard_ragged(eqn) else NO_RAGGED_FORM

    def use(i: int, weight: TracedWeight) -> MatrixUse | str:
        if i > 1:
            return "it is a group size"
        axes = axes_of(weight, contracted[i], groups[i])
        if isinstance(axes, str):
            return axes
        why = no_form or _multiplied_inputs(weight, axes) if i else NO_RAGGED_FORM
        return MatrixUse(axes, _work(eqn, i, contracted[i]), _separate_factors(axes, MIXED_RAGGED_FACTORS), why)

    return walker.consume(eqn, values, use)


def _is_standard_ragged(eqn: Any) -> bool:
    """Whether a ragged product multiplies rows with their group's matrix."""
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
    channel = w_spec[0]
    weight = weight.to_memory_of(x)
    kernel_dims = [d for d in range(len(weight.shape)) if d != channel]
    first, second = (weight.a, weight.b) if channel in weight.b.dims else (weight.b, weight.a)
    if weight.multiplier is not None and any(d != channel for d in weight.multiplier.dims):
        raise Decline(MULTIPLIED_INPUTS)
    if channel in first.dims or any(d in second.dims for d in kernel_dims):
        raise Decline(MIXED_KERNEL_FACTORS)
    y = with_base(weight.base, lambda base, x: compat.bind(eqn, [x, base])[0], x)
    if weight.is_frozen:
        return [y]
    hidden = _conv_to_rank(scope, eqn, weight, first, x)
    if (observation := scope.session.observation) is not None:
        return [observe(y, hidden, observation)]
    names = [("y", i) for i in range(y.ndim)]
    names[y_spec[1]] = channel
    delta = _conv_from_rank(eqn, hidden, second.expand([channel], weight.shape), names).reshape(y.shape)
    scope.record_factored(
        weight, eqn, 2 * hidden.size * math.prod(weight.shape[d] for d in kernel_dims) + 2 * weight.rank * y.size
    )
    return [total(NamedArray(y, tuple(names)), delta, weight.multiplier, nonzero=weight.nonzero)]


def _conv_to_rank(scope: Any, eqn: Any, weight: Factored, factor: NamedArray, x: Array) -> Array:
    """The convolution with ``factor``: the kernel's own layout, with the rank in place of the output channels, once
    for each group."""
    p, channel = eqn.params, eqn.params["dimension_numbers"].rhs_spec[0]
    order = [RANK if d == channel else d for d in range(len(weight.shape))]
    shape = [weight.rank if d == RANK else weight.shape[d] for d in order]
    dropped = adapter_input(scope, weight, NamedArray(x, tuple(("x", i) for i in range(x.ndim)))).array
    kernel = jnp.concatenate([factor.broadcast(order, shape).astype(dropped.dtype)] * p["feature_group_count"], channel)
    return lax.conv_general_dilated(
        dropped,
        kernel,
        **{k: p[k] for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")},
        dimension_numbers=p["dimension_numbers"],
        feature_group_count=p["feature_group_count"],
    )


def _conv_from_rank(eqn: Any, hidden: Array, factor: NamedArray, names: Sequence[Any]) -> Array:
    """The 1x1 convolution of ``hidden`` with ``factor``: a product over the rank, group by group. ``names`` are those
    of the result's axes, with an axis of groups and one of channels per group in place of its channels."""
    groups, at = eqn.params["feature_group_count"], eqn.params["dimension_numbers"].out_spec[1]
    rank, channel = hidden.shape[at] // groups, names[at]
    hidden = hidden.reshape(*hidden.shape[:at], groups, rank, *hidden.shape[at + 1 :])
    array = factor.transpose([RANK, channel]).reshape(rank, groups, -1)
    hidden_names, out = ((*names[:at], "group", last, *names[at + 1 :]) for last in (RANK, channel))
    product = Product((hidden_names, (RANK, "group", channel), out), eqn.params["precision"], last=True)
    return chain([product], hidden, array)


def label_conv_general_dilated(walker: Any, eqn: Any, values: list[Value]) -> list[Value]:
    kernel = eqn.params["dimension_numbers"].rhs_spec
    no_form = NO_BATCH_GROUPS if eqn.params["batch_group_count"] != 1 else ""

    def use(i: int, weight: TracedWeight) -> MatrixUse | str:
        axes = axes_of(weight, kernel[1:], ()) if i == 1 else "it is the image of a convolution"
        if isinstance(axes, str):
            return axes
        why = no_form or _multiplied_inputs(weight, axes)
        return MatrixUse(axes, _work(eqn, i, kernel[1:]), _separate_factors(axes, MIXED_KERNEL_FACTORS), why)

    return walker.consume(eqn, values, use)


def _multiplied_inputs(weight: TracedWeight, axes: Axes) -> str:
    multiplied = weight.multiplier_axes
    return MULTIPLIED_INPUTS if multiplied and multiplied & {*axes.batch, *axes.inputs} else ""


def _separate_factors(axes: Axes, why: str) -> tuple[Requirement, ...]:
    """Requires that no factor has both inputs and outputs of this product."""
    return tuple(Requirement(frozenset(group), True, why) for group in axes[1:])


def _work(eqn: Any, i: int, contracted: Sequence[int]) -> int:
    """The multiplications of a product: one per entry of the result and summed term."""
    shape = eqn.invars[i].aval.shape
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
