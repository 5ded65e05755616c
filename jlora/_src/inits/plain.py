"""`to_plain`: adapters of a residual as plain LoRA of the original weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora._src.algebra.matrices import balanced, factor_matrices, to_matrices, truncated_svd, with_matrices
from jlora._src.engine import compat
from jlora._src.paths import named_leaves, path_key
from jlora._src.tree.checks import check_adapters, check_arguments, check_finite, check_paths
from jlora._src.types import Adapters, Array, LoraFactors, Path, PyTree
from jlora.messages import bullets

_SLACK = 1e-4
"""The share of the change that may be lost to float32 arithmetic."""


def to_plain(params: PyTree, residual: PyTree, adapters: Adapters) -> dict[Path, LoraFactors | Array]:
    """Adapters of twice the rank for the original ``params``, equal to ``adapters`` for ``residual``.

    What `decompose` took out of a weight, ``W - R = s·A₀·B₀``, has rank r: its factors are recovered and subtracted,
    ``A' = [A, A₀]`` and ``B' = [B, -B₀]``, so that ``W + s·A'·B' = R + s·A·B``. So trained adapters can be shipped
    without the residual: to PEFT and vLLM (`jlora.peft.save`), or merged into the original weights.

    >>> residual, adapters = jlora.decompose(params, plan, method="pissa")
    >>> plain = jlora.to_plain(params, residual, train(residual, adapters))
    >>> peft.save("my_adapter", names, params, plain, config)

    The residual may be computed again: `decompose` gives the same one for the same params, plan and key.

    Args:
      params: the parameters given to `decompose`.
      residual: the residual that it returned.
      adapters: the trained adapters.

    Returns:
      The adapters, new factors in float32 or wider. Leaves trained whole, and factors of weights that are the same
      array in both trees, are returned as they are.

    Raises:
      ValueError: listing every weight whose change is not of the adapter's rank, as under a quantized residual. Not
        checked under ``jit``. Adapters that do not fit, as `merge`.
      KeyError, TypeError: as `merge`.
    """
    check_arguments(params, adapters, "to_plain")
    leaves, rests = named_leaves(params)[0], _leaves_of(residual)
    check_adapters(leaves, adapters, "to_plain")
    check_paths(adapters, rests, "to_plain")
    check_finite(adapters, "to_plain")
    found: dict[Path, LoraFactors | Array] = {}
    lost: dict[Path, Array] = {}
    with jax.default_matmul_precision("highest"):
        for path, value in adapters.items():
            if not isinstance(value, LoraFactors) or leaves[path] is rests[path]:
                found[path] = value
            else:
                found[path], lost[path] = _plain(leaves[path], rests[path], value, path)
    if not any(isinstance(x, Tracer) for x in lost.values()):
        wrong = [repr(path) for path, share in lost.items() if not float(share) <= 1]
        if wrong:
            raise ValueError(
                "to_plain: the params and the residual differ by more than an update of the adapters' rank:"
                f"{bullets(wrong)}\nExpected the params given to jlora.decompose, and its residual without a "
                "quantization. For a quantized residual, ship merged weights: "
                "jlora.merge(residual, adapters), with the residual dequantized."
            )
    return found


def _leaves_of(residual: PyTree) -> dict[Path, Any]:
    """The leaves by path; a quantized one is one leaf."""
    tree = jax.tree.map(
        lambda x: x.dequantize() if hasattr(x, "dequantize") else x,
        residual,
        is_leaf=lambda x: hasattr(x, "dequantize"),
    )
    return named_leaves(tree)[0]


def _plain(leaf: Any, rest: Any, f: LoraFactors, path: Path) -> tuple[LoraFactors, Array]:
    """The factors for the original weight, and the norm of what they miss, over what rounding may lose."""
    weight, left = (to_matrices(jnp.asarray(compat.to_device(x)), f.axes) for x in (leaf, rest))
    change = weight - left
    u, s, vh = truncated_svd(change, f.rank, 2, path_key(jax.random.key(0), path))
    a, b = balanced(u, s, vh, f.scale)
    rounding = float(jnp.finfo(leaf.dtype).eps) / 2 * jnp.linalg.norm(left.ravel())
    missed = jnp.linalg.norm((change - f.scale * (a @ b)).ravel())
    allowed = rounding + _SLACK * jnp.linalg.norm(change.ravel())
    own_a, own_b = factor_matrices(f)
    joined = with_matrices(f, jnp.concatenate([own_a, a], -1), jnp.concatenate([own_b, -b], -2), f.scale)
    return joined, missed / jnp.maximum(allowed, jnp.finfo(jnp.float32).tiny)
