"""The low-rank product ``(x·a)·b`` with its own gradient, oriented so that no activation is transposed."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jlora import _compat
from jlora._named import contract, low_rank_dtype
from jlora._types import Array

Names = tuple[Hashable, ...]


class Contraction(NamedTuple):
    """Which axes of a low-rank product meet: the names of the axes of every operand. Hashable."""

    x: Names
    first: Names
    hidden: Names
    second: Names
    out: Names
    precision: Any = None
    specs: tuple[tuple[tuple[Hashable, Any], ...], ...] | None = None

    def spec(self, i: int) -> Mapping[Hashable, Any] | None:
        """On a mesh with Explicit axes: the mesh axes of x, first, hidden, second, out (``i`` from 0)."""
        return None if self.specs is None else dict(self.specs[i])


def low_rank_product(x: Array, a: Array, b: Array, *, inputs: int = 1) -> Array:
    """``(x·a)·b``: the update of a LoRA layer, without its scale (Hu et al. 2021, eq. 3).

    Its gradient is formed as ``dA = (dhᵀ x)ᵀ`` and ``dB = hᵀ g`` with ``h = x·a`` and ``dh = g·bᵀ``, so
    that XLA:CPU never transposes an activation. Reverse mode only: `jax.jvp` and `jax.linearize` through
    it raise a TypeError, as for every `jax.custom_vjp`; Hessian-vector products (``grad`` of ``grad``) work.

    >>> y = x @ w + scale * jlora.low_rank_product(x, a, b)

    Args:
      x: activations ``[..., *inputs]``, any float dtype. Products run in it, or in bfloat16 if it is narrower, with
        float32 accumulation.
      a: ``[*inputs, rank]``.
      b: ``[rank, *outputs]``.
      inputs: how many trailing axes of ``x`` are contracted.

    Returns:
      ``[..., *outputs]`` in the dtype of the products.

    Raises:
      ValueError: when the shapes do not fit.
    """
    if a.ndim != inputs + 1 or x.shape[x.ndim - inputs :] != a.shape[:-1] or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"low_rank_product: got x {x.shape}, a {a.shape}, b {b.shape} with inputs={inputs}. Expected "
            "a = x's last `inputs` axes + (rank,), and b = (rank,) + outputs."
        )
    lead = tuple(("x", i) for i in range(x.ndim - inputs))
    ins = tuple(("in", i) for i in range(inputs))
    outs = tuple(("out", i) for i in range(b.ndim - 1))
    names = Contraction((*lead, *ins), (*ins, "r"), (*lead, "r"), ("r", *outs), (*lead, *outs))
    return contract_factors(names, x.astype(low_rank_dtype(x.dtype)), a, b)


def contract_factors(names: Contraction, x: Array, first: Array, second: Array) -> Array:
    """``x`` contracted with ``first``, then with ``second``; see `low_rank_product`."""
    return _jitted(names, *_compat.vary_alike(x, first, second))


def widen(
    hidden: Array,
    hidden_names: Sequence[Hashable],
    second: Array,
    second_names: Sequence[Hashable],
    out: Sequence[Hashable],
    precision: Any = None,
) -> Array:
    """The last product alone, from rank back to full width, as `low_rank_product` does it.

    It is a ``custom_vjp`` of its own, and so no dot to the policies of `jax.checkpoint` that save dots: they keep
    ``hidden``, which is small, and this is computed from it again.
    """
    names = Contraction((), (), tuple(hidden_names), tuple(second_names), tuple(out), precision)
    return _widened(names, *_compat.vary_alike(hidden, second))


def explicit_specs(
    mesh_specs: Sequence[tuple[Names, Sequence[Any] | None]],
) -> tuple[tuple[tuple[Hashable, Any], ...], ...] | None:
    """`Contraction.specs` from the names and PartitionSpec entries of its five arrays, if they have any."""
    if all(spec is None for _, spec in mesh_specs):
        return None
    return tuple(tuple(zip(names, spec or (None,) * len(names), strict=True)) for names, spec in mesh_specs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(names: Contraction, x: Array, first: Array, second: Array) -> Array:
    return _forward(names, x, first, second)[0]


def _forward(names: Contraction, x: Array, first: Array, second: Array) -> tuple[Any, tuple[Array, ...]]:
    n, p = names, names.precision
    hidden = contract(x, n.x, first.astype(x.dtype), n.first, n.hidden, precision=p, spec=n.spec(2))
    return _widened(names, hidden, second), (x, first, second, hidden)


def _backward(names: Contraction, residuals: tuple[Array, ...], g: Array):
    n, p = names, names.precision
    x, first, second, hidden = residuals
    dh, d_second = _widened_backward(names, (hidden, second), g.astype(x.dtype))
    d_first = contract(dh, n.hidden, x, n.x, n.first, precision=p, dtype=first.dtype, spec=n.spec(1))
    dx = contract(dh, n.hidden, first.astype(x.dtype), n.first, n.x, precision=p, spec=n.spec(0))
    return dx, d_first, d_second


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widened(names: Contraction, hidden: Array, second: Array) -> Array:
    n, p = names, names.precision
    return contract(hidden, n.hidden, second.astype(hidden.dtype), n.second, n.out, precision=p, spec=n.spec(4))


def _widened_forward(names: Contraction, hidden: Array, second: Array):
    return _widened(names, hidden, second), (hidden, second)


def _widened_backward(names: Contraction, residuals: tuple[Array, ...], g: Array):
    n, p = names, names.precision
    hidden, second = residuals
    d_hidden = contract(g, n.out, second.astype(g.dtype), n.second, n.hidden, precision=p, spec=n.spec(2))
    d_second = contract(hidden, n.hidden, g, n.out, n.second, precision=p, dtype=second.dtype, spec=n.spec(3))
    return d_hidden, d_second


_product.defvjp(_forward, _backward)
_widened.defvjp(_widened_forward, _widened_backward)
# Under jit, equal layers are traced and differentiated once: a custom_vjp alone is traced anew at every call.
_jitted = jax.jit(_product, static_argnums=0)
