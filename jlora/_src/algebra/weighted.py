"""`add_weighted`: one adapter from several."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jlora._src.algebra.linear import on_base
from jlora._src.algebra.matrices import balanced, factor_matrices, joined, product_svd, truncated_svd, with_matrices
from jlora._src.algebra.parts import Parts, check_alike, parts
from jlora._src.algebra.ranks import check_options
from jlora._src.algebra.sparse import Rule, combined
from jlora._src.paths import one_key, path_key
from jlora._src.tree.checks import check_finite
from jlora._src.types import Adapters, Array, LoraFactors, Path, PyTree
from jlora.messages import bullets, nearest, shown

Combination = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
_RULES: Mapping[str, Rule] = {
    "linear": Rule(),
    "cat": Rule(),
    "svd": Rule(),
    "ties": Rule("magnitude", elects=True),
    "dare_linear": Rule("random"),
    "dare_ties": Rule("random", elects=True),
    "magnitude_prune": Rule("magnitude"),
}
_METHODS = {method: _RULES.get(method) or _RULES[method.removesuffix("_svd")] for method in Combination.__args__}


def add_weighted(
    adapters: Sequence[Adapters],
    weights: Sequence[float] | Array,
    method: Combination = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] | None = None,
    key: Array | None = None,
    params: PyTree | None = None,
) -> dict[Path, LoraFactors | Array]:
    """One adapter from several of one base: the weighted sum of their updates, or PEFT's other combinations.

    >>> sum_of_both = jlora.add_weighted([first, second], [0.5, 0.5], "cat")
    >>> small = jlora.add_weighted([first, second], [0.5, 0.5], "svd", rank=8)

    The methods are those of PEFT's ``add_weighted_adapter``, and give its updates. Of the sum ``Σ wᵢ·sᵢ·Aᵢ·Bᵢ``:

    - ``"cat"`` is exact. Its rank is the sum of the ranks.
    - ``"svd"`` is the nearest update of a ``rank``, computed from the factors' triangular parts: no array has the size
      of a weight.
    - ``"linear"`` is no such sum: A and B are added separately, each with the square root of ``|wᵢ·sᵢ|`` (and A with
      the sign), so that products ``Aᵢ·Bⱼ`` of different adapters enter too. Exact only for a single adapter.

    The others leave out entries, and act on A and B separately, as ``"linear"`` does; those that end in ``_svd`` act on
    the updates themselves, one weight (one slice of a stacked weight) at a time in float32, and approximate the result
    by ``rank``:

    - ``"magnitude_prune"`` keeps the share ``density`` of the entries, those of the largest magnitude.
    - ``"ties"`` does the same. Each entry is then the mean over the adapters whose sign is that of the majority (Yadav
      et al. 2023, https://arxiv.org/abs/2306.01708).
    - ``"dare_linear"`` keeps random entries, each with probability ``density``, and divides them by it (Yu et al. 2023,
      https://arxiv.org/abs/2311.03099). ``"dare_ties"`` also elects signs as ``"ties"`` does.

    PEFT treats a single adapter as ``"linear"`` whatever the method; here a method always does the same.

    Args:
      adapters: one or more, plain LoRA. Scales and dtypes may differ, as may ranks, except where A and B are combined
        separately. One that lacks a path counts as zero there.
      weights: a number for each adapter, of any sign; may be traced.
      method: as above.
      rank: for ``svd`` and those that end in it; by default, as in PEFT, the largest of all adapters. A weight gets
        less if its sum has less.
      density: for all but ``"linear"``, ``"cat"`` and ``"svd"``: above 0 and at most 1.
      majority_sign: for ``"ties"`` and ``"dare_ties"``: ``"total"``, that of the sum of the entries (the default), or
        ``"frequency"``, that of most entries.
      key: a PRNG key, for ``"dare_*"``; each weight, slice and adapter gets its own mask.
      params: the base, needed for leaves trained whole: their differences to it are combined, by the method's rule for
        updates, and added to it.

    Returns:
      ``{path: LoraFactors | array}`` over all paths, of scale 1, float32 or wider. The dropout rate of a path is that
      of the first adapter that has it.

    Raises:
      ValueError: listing every path with DoRA, or that differs in kind, axes, shape, or, where that matters, rank;
        every leaf trained whole if there are no params; for NaN or infinity (not under ``jit``); for no adapters,
        weights of another number, or options out of range.
      TypeError: for an unknown method, an option that it does not take, and a missing one; as `merge`.
      KeyError: as `merge`.
    """
    trees, what = list(adapters), "add_weighted"
    if not trees:
        raise ValueError(f"{what}: got no adapters; expected one or more.")
    rule = _rule(method, density, majority_sign, key)
    check_options(what, rank, None, optional=True)
    if rank is not None and not method.endswith("svd"):
        raise TypeError(f"{what}: method={method!r} takes no rank; expected it with 'svd' and methods that end in _svd")
    key = None if key is None else one_key(key, what, "key")
    found = [parts(tree, params, f"{what}, adapters {i}") for i, tree in enumerate(trees)]
    check_alike(trees, what)
    separately = method not in ("cat", "svd") and not method.endswith("svd")
    if separately:
        _check_ranks(found, method)
    for i, tree in enumerate(trees):
        check_finite(tree, f"{what}, adapters {i}")
    numbers = _numbers(weights, len(trees))
    largest = max((f.rank for tree in found for f in tree.factors.values()), default=1)

    def one(path: Path) -> LoraFactors | Array:
        own = None if key is None else path_key(key, path)
        column = [(tree.factors[path], w) for tree, w in zip(found, numbers, strict=True) if path in tree.factors]
        if not column:
            changes = [(tree.whole[path], w) for tree, w in zip(found, numbers, strict=True) if path in tree.whole]
            total = combined(jnp.stack([x for x, _ in changes]), jnp.stack([w for _, w in changes]), rule, own)
            return on_base(params, {path: total})[path]
        if method == "cat":
            return _sum(column)
        if method == "svd":
            return _nearest_sum(column, rank or largest)
        if separately:
            return _separately(column, own, rule)
        return _nearest(column, own, rule, rank or largest)

    with jax.default_matmul_precision("highest"):
        return {path: one(path) for path in dict.fromkeys(path for tree in trees for path in tree)}


_Column: TypeAlias = Sequence[tuple[LoraFactors, Array]]
"""The factors of one weight, each with the weight of its adapter."""


@jax.jit
def _sum(column: _Column) -> LoraFactors:
    return with_matrices(column[0][0], *joined(column))


@functools.partial(jax.jit, static_argnames="rank")
def _nearest_sum(column: _Column, rank: int) -> LoraFactors:
    u, s, vh = product_svd(*joined(column))
    return with_matrices(column[0][0], *balanced(u[..., :rank], s[..., :rank], vh[..., :rank, :], 1.0))


@functools.partial(jax.jit, static_argnames="rule")
def _separately(column: _Column, key: Array | None, rule: Rule) -> LoraFactors:
    """Each of A and B combined by itself."""
    a, b = (_same_dtype(x) for x in zip(*(factor_matrices(f) for f, _ in column), strict=True))
    scaled = jnp.stack([f.scale * w for f, w in column])
    root = jnp.sqrt(jnp.abs(scaled))
    sides = ((a, jnp.where(scaled < 0, -root, root)), (b, root))
    keys = (None, None) if key is None else jax.random.split(key)

    def of_slices(tensors: Array, weights: Array, key: Array | None) -> Array:
        n, *batch, rows, columns = tensors.shape
        slices = tensors.reshape(n, math.prod(batch), rows, columns).swapaxes(0, 1)
        total = lax.map(lambda x: combined(x[0], weights, rule, x[1]), (slices, _slice_keys(key, len(slices))))
        return total.reshape(*batch, rows, columns)

    one, other = (of_slices(x, w, k) for (x, w), k in zip(sides, keys, strict=True))
    return with_matrices(column[0][0], one, other)


@functools.partial(jax.jit, static_argnames=("rule", "rank"))
def _nearest(column: _Column, key: Array | None, rule: Rule, rank: int) -> LoraFactors:
    """The nearest factors of a rank to what a rule makes of the updates, slice by slice."""
    matrices = [factor_matrices(f) for f, _ in column]
    scales, weights = [f.scale for f, _ in column], jnp.stack([w for _, w in column])
    batch = matrices[0][0].shape[:-2]
    flat = jax.tree.map(lambda x: x.reshape(math.prod(batch), *x.shape[-2:]), matrices)

    def of_slice(x: Any) -> tuple[Array, Array]:
        pairs, key = x
        updates = jnp.stack([(s * (a @ b)).astype(jnp.float32) for s, (a, b) in zip(scales, pairs, strict=True)])
        u, s, vh = truncated_svd(combined(updates, weights, rule, key), rank)
        return balanced(u, s, vh, 1.0)

    a, b = lax.map(of_slice, (flat, _slice_keys(key, math.prod(batch))))
    return with_matrices(column[0][0], a.reshape(*batch, *a.shape[1:]), b.reshape(*batch, *b.shape[1:]))


def _slice_keys(key: Array | None, count: int) -> Array | None:
    return None if key is None else jax.random.split(key, count)


def _same_dtype(arrays: Sequence[Array]) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.stack(arrays)


def _rule(method: Any, density: Any, majority_sign: Any, key: Any) -> Rule:
    """The rule of a method with its options.

    Raises:
      TypeError, ValueError: as `add_weighted`.
    """
    if method not in _METHODS:
        raise TypeError(
            f"add_weighted: got method={shown(method)}{nearest(str(method), _METHODS)}; expected one of "
            f"{', '.join(_METHODS)}"
        )
    rule = _METHODS[method]
    given = {"density": density, "majority_sign": majority_sign, "key": key}
    takes = {"density": rule.pruned != "none", "majority_sign": rule.elects, "key": rule.pruned == "random"}
    wrong = [f"it takes no {name}" for name, value in given.items() if value is not None and not takes[name]]
    wrong += [f"it needs {n}" for n in ("density", "key") if takes[n] and given[n] is None]
    if wrong:
        raise TypeError(f"add_weighted: method={method!r}:{bullets(wrong)}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"add_weighted: got density={shown(density)}; expected a share above 0 and at most 1")
    if majority_sign not in (None, "total", "frequency"):
        raise ValueError(f"add_weighted: got majority_sign={shown(majority_sign)}; expected 'total' or 'frequency'")
    return rule._replace(density=density or 1.0, majority_sign=majority_sign or "total")


def _check_ranks(found: Sequence[Parts], method: str) -> None:
    """Raises a ValueError listing every path whose ranks differ."""
    ranks: dict[Path, list[int]] = {}
    for tree in found:
        for path, f in tree.factors.items():
            ranks.setdefault(path, []).append(f.rank)
    if wrong := [f"{path!r}: ranks {own}" for path, own in ranks.items() if len(set(own)) > 1]:
        other = "svd" if method == "linear" else f"{method}_svd"
        raise ValueError(
            f"add_weighted: method={method!r} combines A and B separately, so they need one rank:{bullets(wrong)}\n"
            f"Pass method={other!r}, which acts on the updates, or 'cat', their exact sum."
        )


def _numbers(weights: Any, count: int) -> Array:
    """The weights, ``[n]`` in float32.

    Raises:
      ValueError: for another number of them, and for NaN or infinity.
    """
    numbers = jnp.asarray(weights if isinstance(weights, jax.Array) else [*weights], jnp.float32)
    if numbers.shape != (count,):
        raise ValueError(f"add_weighted: got weights of shape {numbers.shape}; expected {count}, one for each adapter")
    if not isinstance(numbers, Tracer) and not np.all(np.isfinite(numbers)):
        raise ValueError(f"add_weighted: got weights {shown(weights)}; expected finite numbers")
    return numbers
