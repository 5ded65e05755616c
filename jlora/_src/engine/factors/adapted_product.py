"""The product with an adapted weight, ``x·w + h·b`` with ``h = x·a``, in the form that suits the platform.

CPUs and GPUs run two products and a sum. On a TPU that would write and read the full-width result once more, which
takes far longer than its FLOPs suggest; there, one product with a longer contraction, ``[x, h]·[w; b]``, does both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jlora._src.engine import compat
from jlora._src.engine.factors.named_axes import RANK, NamedArray, accumulation_dtype, contract
from jlora._src.engine.factors.product import HIDDEN, AxisNames, Product, bind_product, chain, mapped_name
from jlora._src.types import Array


@dataclasses.dataclass(frozen=True)
class Dot:
    """The model's own product of an activation and a weight, also under ``vmap``. Hashable.

    Attributes:
      params: those of its ``dot_general``.
      weight_left: whether the weight is the left operand.
      mapped: ``in_axes`` of the ``vmap``s around it, innermost first.
    """

    params: tuple[tuple[str, Any], ...]
    weight_left: bool
    mapped: tuple[tuple[int | None, int | None], ...] = ()

    def __call__(self, x: Array, w: Array) -> Array:
        def dot(x: Array, w: Array) -> Array:
            operands = (w, x) if self.weight_left else (x, w)
            return core.primitives.dot_general_p.bind(*operands, **dict(self.params))

        for in_axes in self.mapped:
            dot = jax.vmap(dot, in_axes)
        return dot(x, w)


@dataclasses.dataclass(frozen=True)
class AdaptedProduct:
    """The axes of ``x·w + h·b`` with ``h = x·a``: the primitive's parameter. Hashable.

    Attributes:
      names: the names of the axes of ``x``, ``w``, ``h``, ``a``, ``b`` and the result.
      dot: the model's own ``x·w``; None in its transpose.
      precision: as in `jax.lax.dot_general`.
    """

    names: tuple[AxisNames, AxisNames, AxisNames, AxisNames, AxisNames, AxisNames]
    dot: Dot | None
    precision: Any = None

    @property
    def base(self) -> Product:
        """``x·w``."""
        return self._product(0, 1, last=True)

    @property
    def first(self) -> Product:
        """``x·a``."""
        x, _, h, a, _, _ = self.names
        return Product((x, a, h), self.precision)

    @property
    def last(self) -> Product:
        """``h·b``."""
        return self._product(2, 4, last=True)

    def _product(self, left: int, right: int, *, last: bool) -> Product:
        operands = self.names[left], self.names[right]
        return Product(
            (*operands, tuple(n for n in self.names[5] if n in {*sum(operands, ())})), self.precision, last=last
        )

    @property
    def transposed(self) -> AdaptedProduct:
        """From a cotangent ``g`` of the result to that of ``x``: ``g·w + (g·b)·a``."""
        x, w, h, a, b, out = self.names
        return AdaptedProduct((out, w, h, b, a, x), None, self.precision)

    @property
    def joint(self) -> Hashable | None:
        """The one axis summed in ``x·w`` that becomes the rank in ``h`` and ``b``; None if there is no such axis."""
        x, w, h, _, b, out = map(frozenset, self.names)
        summed = (x & w) - out
        pairs = (x, h), (w, b)
        return next(iter(summed)) if len(summed) == 1 and all(p - summed == q - {RANK} for p, q in pairs) else None


def adapted_product(x: Array, w: Array, a: Array, b: Array, axes: AdaptedProduct, dtype: Any) -> Array:
    """``x·w + (x·a)·b``, accumulated in float32 and rounded to ``dtype``; ``x`` and ``w`` have one dtype."""
    x, w, a, b = compat.match_varying(x, w, a, b)
    h = chain([axes.first], x, a)
    return _adapted_p.bind(x, w, h, a, b, axes=axes, dtype=jnp.dtype(dtype))


# The operands are x, w, h, a, b, and in derivatives also e: the result is x·w + (x·a + e)·b. The operand h, always x·a,
# is computed outside, where `jax.checkpoint` can save it and the gradient of b can use it; its own tangent does not
# count. The transpose has the same form, so that the backward pass is one product too.
_adapted_p = core.Primitive("adapted_product")


def _separate(x: Array, w: Array, h: Array, a: Array, b: Array, *e: Array, axes: AdaptedProduct, dtype: Any) -> Array:
    """Two products and their sum."""
    h = sum(e, h)
    base, last, out = axes.base.names, axes.last.names, axes.names[5]
    if axes.dot is not None:
        y = NamedArray(axes.dot(x, w), base[2])
    else:  # as JAX transposes it
        y = contract(NamedArray(x, base[0]), NamedArray(w, base[1]), base[2], precision=axes.precision, x_left=True)
    delta = contract(NamedArray(h, last[0]), NamedArray(b.astype(h.dtype), last[1]), last[2], precision=axes.precision)
    sizes = y.sizes | delta.sizes
    wide = accumulation_dtype(y.array.dtype)
    y, delta = (part.broadcast(out, [sizes[n] for n in out]).astype(wide) for part in (y, delta))
    return (y + delta).astype(dtype)


def _joined(x: Array, w: Array, h: Array, a: Array, b: Array, *e: Array, axes: AdaptedProduct, dtype: Any) -> Array:
    """One product, ``[x, h]·[w; b]``."""
    h = sum(e, h)
    x_names, w_names, h_names, _, b_names, out = axes.names

    def join(wide: Array, names: AxisNames, narrow: Array, own: AxisNames) -> NamedArray:
        order = [RANK if n == axes.joint else n for n in names]
        narrow = NamedArray(narrow.astype(wide.dtype), own).transpose(order)
        return NamedArray(jnp.concatenate([wide, narrow], names.index(axes.joint)), names)

    pair = join(x, x_names, h, h_names), join(w, w_names, b, b_names)
    return contract(*pair, out, precision=axes.precision, dtype=dtype).array


def _joining_pays(x: Array, w: Array, axes: AdaptedProduct, dtype: Any) -> bool:
    """Whether the joined form has fewer cycles on a TPU, by its compiler's estimates (docs/speed.md): where the result
    is wider than the input, or does not stay in the chip's vector memory. Joining copies the weight."""
    x_names, w_names, *_, out = axes.names
    if axes.joint is None:
        return False
    sizes = NamedArray(x, x_names).sizes | NamedArray(w, w_names).sizes
    outputs = math.prod(n for name, n in sizes.items() if name in w_names and name in out)
    return outputs > sizes[axes.joint] or math.prod(sizes[n] for n in out) * dtype.itemsize >= _LARGE


_LARGE = 32 * 2**20  # bytes, a quarter of the vector memory of a v5e's or v6e's core


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], *, axes: AdaptedProduct, dtype: Any) -> tuple[Array, Any]:
    x, w, h, a, b, *e = primals
    dx, dw, _, da, db, *de = tangents

    def given(tangent: Any) -> bool:
        return not isinstance(tangent, ad.Zero)

    def first(x: Array, a: Array) -> Array:
        return bind_product(x, a, axes.first, x.dtype, x.dtype)

    def last(h: Array, b: Array) -> Array:
        return bind_product(h, b, axes.last, h.dtype, dtype)

    terms, dh = [], [t for t in de if given(t)]
    if given(da):
        dh.append(first(x, da))
    if given(dx):
        more = [functools.reduce(ad.add_tangents, dh)] if dh else []
        terms.append(_adapted_p.bind(dx, w, first(dx, a), a, b, *more, axes=axes, dtype=dtype))
    elif dh:
        terms.append(last(functools.reduce(ad.add_tangents, dh), b))
    if given(dw):
        terms.append(bind_product(x, dw, axes.base, x.dtype, dtype))
    if given(db):
        terms.append(last(sum(e, h), db))
    return _adapted_p.bind(*primals, axes=axes, dtype=dtype), functools.reduce(ad.add_tangents, terms)


def _transpose(ct: Any, x: Any, w: Any, h: Any, a: Any, b: Any, *e: Any, axes: AdaptedProduct, dtype: Any) -> list[Any]:
    if isinstance(ct, ad.Zero):
        return [None] * (5 + len(e))
    wanted = tuple(map(ad.is_undefined_primal, (x, w, a, b)))
    back, to = axes.transposed, (w.aval if wanted[1] else w).dtype
    ct = ct.astype(to)
    dh: Any = None if wanted[3] else bind_product(ct, b, back.first, to, to)
    in_x = _adapted_p.bind(ct, w, dh, b, a, axes=back, dtype=to) if wanted[0] else None
    # Without differentiation (`jax.linear_transpose`), and so without e, a weight or a factor may be what is linear.
    in_w = bind_product(ct, x, axes.base.permuted(2, 0, 1), to, w.aval.dtype) if wanted[1] else None
    in_a = bind_product(dh, x, axes.first.permuted(2, 0, 1), to, a.aval.dtype) if wanted[2] else None
    in_b = bind_product(ct, h, axes.last.permuted(2, 0, 1), to, b.aval.dtype) if wanted[3] else None
    return [in_x, in_w, None, in_a, in_b, *(dh if ad.is_undefined_primal(t) else None for t in e)]


def _batch(args: Sequence[Array], dims: Sequence[Any], *, axes: AdaptedProduct, dtype: Any) -> tuple[Array, int]:
    """A mapped axis is one more name, and the first of the result."""
    *names, out = axes.names
    new = mapped_name(out)
    if len(args) == 6 and dims[2] != dims[5]:  # h and e have the same axes
        args, dims = _alike(args, dims)
    names = [own if d is None else (*own[:d], new, *own[d:]) for own, d in zip(names, dims, strict=False)]
    dot = axes.dot
    if dot is not None and (dims[0] is not None or dims[1] is not None):
        dot = dataclasses.replace(dot, mapped=(*dot.mapped, (dims[0], dims[1])))
    mapped: Any = dataclasses.replace(axes, names=(*names, (new, *out)), dot=dot)
    return _adapted_p.bind(*args, axes=mapped, dtype=dtype), 0


def _alike(args: Sequence[Array], dims: Sequence[Any]) -> tuple[Sequence[Array], Sequence[Any]]:
    """``args`` with ``h`` and ``e`` both mapped along their first axis."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    h, e = (batching.bdim_at_front(args[i], dims[i], size) for i in (2, 5))
    return (*args[:2], h, *args[3:5], e), (*dims[:2], 0, *dims[3:5], 0)


def _lower_for_tpu(ctx: Any, *operands: Any, **params: Any) -> Any:
    # A compiler that divides the program over devices would first gather what is concatenated.
    whole = not compat.is_partitioned(ctx)

    def compute(x: Array, w: Array, h: Array, *rest: Array, axes: AdaptedProduct, dtype: Any) -> Array:
        if whole and _joining_pays(x, w, axes, dtype):
            return _joined(x, w, h, *rest, axes=axes, dtype=dtype)
        # Without the barrier, a compiler that sees the whole program computes h again for every tile of the result.
        return _separate(x, w, lax.optimization_barrier(h) if whole else h, *rest, axes=axes, dtype=dtype)

    return mlir.lower_fun(compute, multiple_results=False)(ctx, *operands, **params)


_adapted_p.def_impl(jax.jit(_adapted_p.bind, static_argnames=("axes", "dtype")))
_adapted_p.def_abstract_eval(functools.partial(compat.out_aval, _separate))
mlir.register_lowering(_adapted_p, mlir.lower_fun(_separate, multiple_results=False))
mlir.register_lowering(_adapted_p, _lower_for_tpu, platform="tpu")
ad.primitive_jvps[_adapted_p] = _jvp
ad.primitive_transposes[_adapted_p] = _transpose
batching.primitive_batchers[_adapted_p] = _batch


def as_equations(eqn: Any) -> Any:
    """The jaxpr of an adapted product, in JAX's own operations."""
    return jax.make_jaxpr(functools.partial(_separate, **eqn.params))(*(v.aval for v in eqn.invars))


@functools.lru_cache(maxsize=64)
def checkpoint_policy(policy: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A policy of `jax.checkpoint` for an adapted model: ``policy``, made for the model itself, and the rank.

    `lora` applies it to every `jax.checkpoint` in the model. Use it for one around the adapted model:

    >>> apply = jax.checkpoint(jlora.lora(model.apply), policy=jlora.checkpoint_policy(policy))

    What ``policy`` decides about the model's product ``x·W`` holds for the adapted one, so that policies that save dots
    recompute neither it nor its update. The values ``x·a``, of the size of the rank, are saved too, whatever ``policy``
    is: the gradient of every ``b`` uses them. In a program that the compiler divides over devices (meshes with Auto or
    Explicit axes) they are recomputed with the rest, which a TPU's compiler estimates to be cheaper.

    Args:
      policy: one of `jax.checkpoint_policies`, or a function like these. None saves nothing else.
    """

    def decide(primitive: Any, *operands: Any, **params: Any) -> Any:
        if primitive.name == "name" and params["name"] == HIDDEN:
            return not compat.is_divided(operands[0])
        if policy is None:
            return False
        if primitive is _adapted_p and (dot := params["axes"].dot) is not None:
            eqn = next(e for e in jax.make_jaxpr(dot)(*operands[:2]).eqns if e.primitive.name == "dot_general")
            return policy(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)
        return policy(primitive, *operands, **params)

    return decide
