"""The low-rank product ``(x·a)·b`` and its derivatives, oriented so that no activation is transposed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jlora._src.engine import compat
from jlora._src.engine.factors.named_axes import NamedArray, contract, low_rank_dtype
from jlora._src.types import Array

HIDDEN = "lora_hidden"
"""The name of a first product, for the policies of `jax.checkpoint`: it is small, and every gradient uses it."""

AxisNames = tuple[Hashable, ...]
Spec = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Product:
    """The axes of a two-operand product: the primitive's parameter. Hashable.

    Attributes:
      names: the names of the axes of both operands, and of the result.
      precision: as in `jax.lax.dot_general`.
      specs: on a mesh with Explicit axes, the mesh axes of each of ``names``; None on any other.
      last: whether the product goes from the rank back to full width.
    """

    names: tuple[AxisNames, AxisNames, AxisNames]
    precision: Any = None
    specs: tuple[Spec, Spec, Spec] | None = None
    last: bool = False

    def permuted(self, *order: int) -> Product:
        """This product with its operands and result permuted: 0 and 1 are its operands, 2 is its result."""

        def permute(entries: Any) -> Any:
            return entries and tuple(entries[i] for i in order)

        return dataclasses.replace(self, names=permute(self.names), specs=permute(self.specs))


def low_rank_product(x: Array, a: Array, b: Array, *, inputs: int = 1) -> Array:
    """``(x·a)·b``: the update of a LoRA layer, without its scale (Hu et al. 2021, eq. 3).

    Its gradient is formed as ``dA = (dhᵀ x)ᵀ`` and ``dB = hᵀ g`` with ``h = x·a`` and ``dh = g·bᵀ``, so that XLA:CPU
    never transposes an activation. Forward and reverse mode work, and derivatives of any order.

    >>> y = x @ w + scale * jlora.low_rank_product(x, a, b)

    Args:
      x: activations ``[..., *inputs]``, any float dtype. Products run in this dtype, or in bfloat16 if it is narrower,
        with float32 accumulation.
      a: ``[*inputs, rank]``.
      b: ``[rank, *outputs]``.
      inputs: the number of trailing axes of ``x`` to contract.

    Returns:
      ``[..., *outputs]`` in the dtype of the products.

    Raises:
      ValueError: if the shapes do not fit.
    """
    if a.ndim != inputs + 1 or x.shape[x.ndim - inputs :] != a.shape[:-1] or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"low_rank_product: got x {x.shape}, a {a.shape}, b {b.shape} with inputs={inputs}. Expected "
            "a = x's last `inputs` axes + (rank,), and b = (rank,) + outputs."
        )
    lead = tuple(("x", i) for i in range(x.ndim - inputs))
    ins = tuple(("in", i) for i in range(inputs))
    outs = tuple(("out", i) for i in range(b.ndim - 1))
    first = Product(((*lead, *ins), (*ins, "r"), (*lead, "r")))
    second = Product(((*lead, "r"), ("r", *outs), (*lead, *outs)), last=True)
    return chain((first, second), x.astype(low_rank_dtype(x.dtype)), a, b)


def chain(products: Sequence[Product], x: Array, *factors: Array) -> Array:
    """``x`` contracted with each factor in turn, in the dtype of ``x``; see `low_rank_product`."""
    return _chained(tuple(products), *compat.match_varying(x, *factors))


@functools.partial(jax.jit, static_argnums=0)  # so that equal layers are traced and differentiated once
def _chained(products: tuple[Product, ...], x: Array, *factors: Array) -> Array:
    for product, factor in zip(products, factors, strict=True):
        x = bind_product(x, factor, product, x.dtype, x.dtype)
        x = x if product.last else checkpoint_name(x, HIDDEN)
    return x


# Why a new primitive: JAX's transpose of `lax.dot_general` always puts the cotangent on the left, rounds a factor's
# gradient to the cotangent's dtype, and is a dot to checkpoint policies; a `jax.custom_vjp` has no forward mode.
# `contract` is closed under every transformation: it is linear in either operand, its transposes are contractions of
# the same names, and a mapped axis is one more name.
_contract_p = core.Primitive("contract")


def bind_product(x: Array, y: Array, product: Product, operand_dtype: Any, dtype: Any) -> Array:
    """The product of ``x`` and ``y``, both cast to the dtype ``operand_dtype``, rounded once to ``dtype``."""
    return _contract_p.bind(x, y, product=product, operand_dtype=operand_dtype, dtype=dtype)


def _contract(x: Array, y: Array, *, product: Product, operand_dtype: Any, dtype: Any) -> Array:
    x_names, y_names, out = product.names
    spec = product.specs and dict(zip(out, product.specs[2], strict=True))
    x, y = x.astype(operand_dtype), y.astype(operand_dtype)
    operands = NamedArray(x, x_names), NamedArray(y, y_names)
    return contract(*operands, out, precision=product.precision, dtype=dtype, spec=spec).array


def _jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[Array, Any]:
    """A first product is a plain dot: its value is small, and the policies of `jax.checkpoint` that save dots
    save it. A last product has full width; those policies do not see a dot, so it is recomputed."""
    (x, y), (dx, dy) = primals, tangents
    value = _contract_p.bind(x, y, **params) if params["product"].last else _contract(x, y, **params)
    pairs = [pair for pair, t in (((dx, y), dx), ((x, dy), dy)) if not isinstance(t, ad.Zero)]
    return value, functools.reduce(ad.add_tangents, [_contract_p.bind(*pair, **params) for pair in pairs])


def _transpose_x(ct: Array, x: Any, y: Array, *, product: Product, operand_dtype: Any, dtype: Any) -> Array:
    return bind_product(ct, y, product.permuted(2, 1, 0), operand_dtype, x.aval.dtype)


def _transpose_y(ct: Array, x: Array, y: Any, *, product: Product, operand_dtype: Any, dtype: Any) -> Array:
    return bind_product(ct, x, product.permuted(2, 0, 1), operand_dtype, y.aval.dtype)


def mapped_name(names: Iterable[Hashable]) -> Hashable:
    """The name of a newly mapped axis, beside ``names``."""
    return ("mapped", sum(isinstance(n, tuple) and n[0] == "mapped" for n in names))


def _batch(args: Sequence[Array], dims: Sequence[Any], *, product: Product, **params: Any) -> tuple[Array, int]:
    """A mapped axis is one more name, and the first of the result."""
    *names, out = product.names
    new = mapped_name({*names[0], *names[1]})
    names = [own if d is None else (*own[:d], new, *own[d:]) for own, d in zip(names, dims, strict=True)]
    specs = product.specs
    if specs is not None:
        *own, out_spec = specs
        given = [compat.explicit_spec(x) if d is not None else None for x, d in zip(args, dims, strict=True)]
        along = [spec[d] for spec, d in zip(given, dims, strict=True) if spec is not None]
        own = [before if now is None else now for before, now in zip(own, given, strict=True)]
        specs = (*own, (next((axis for axis in along if axis is not None), None), *out_spec))
    mapped: Any = dataclasses.replace(product, names=(*names, (new, *out)), specs=specs)
    return _contract_p.bind(*args, product=mapped, **params), 0


_contract_p.def_impl(jax.jit(_contract, static_argnames=("product", "operand_dtype", "dtype")))
_contract_p.def_abstract_eval(functools.partial(compat.out_aval, _contract))
mlir.register_lowering(_contract_p, mlir.lower_fun(_contract, multiple_results=False))
ad.defbilinear(_contract_p, _transpose_x, _transpose_y)
ad.primitive_jvps[_contract_p] = _jvp
batching.primitive_batchers[_contract_p] = _batch
