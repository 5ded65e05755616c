"""`extract`: adapters from the difference of two trees of parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jlora._src.algebra.matrices import balanced, to_factors, to_matrices, truncated_svd
from jlora._src.algebra.ranks import check_options, rank_for
from jlora._src.config import LoraConfig
from jlora._src.paths import named_leaves, one_key, path_key
from jlora._src.quantized import as_array
from jlora._src.tree.init import check_values, copy_of, planned, with_magnitude
from jlora._src.tree.plan import Plan
from jlora._src.types import Array, Axes, LoraFactors, Path, PyTree, Target, Uses
from jlora.messages import bullets, nearest, table


class EnergyKept(dict[Path, Array]):
    """``{path: share of the squared norm of the change that the factors keep}``, scalars; prints as a readable table.

    Attributes:
      ranks: ``{path: rank}``.
      changes: ``{path: norm of the change}``, scalars.
      bases: ``{path: norm of the base}``, scalars.
    """

    def __init__(
        self, shares: dict[Path, Array], ranks: dict[Path, int], changes: dict[Path, Array], bases: dict[Path, Array]
    ):
        super().__init__(shares)
        self.ranks, self.changes, self.bases = ranks, changes, bases

    @property
    def total(self) -> Array:
        """The share over all weights."""
        squares = {path: jnp.square(jnp.asarray(x)) for path, x in self.changes.items()}
        total = jnp.asarray(sum(squares.values()))
        kept = jnp.asarray(sum(self[path] * x for path, x in squares.items()))
        return jnp.where(total > 0, kept / jnp.where(total > 0, total, 1), 1)

    def __str__(self) -> str:
        rows = [
            (path, str(self.ranks[path]), f"{_ratio(self.changes[path], self.bases[path]):.2g}", f"{float(share):.2%}")
            for path, share in self.items()
        ]
        worst = min(self, key=lambda path: float(self[path]), default=None)
        last = "no weight has factors"
        if worst is not None:
            last = f"kept in all: {float(self.total):.2%}; least in {worst}: {float(self[worst]):.2%}"
        return f"{table(('weight', 'rank', 'change / base', 'energy kept'), rows, right=(1, 2, 3))}\n{last}"


def _ratio(change: Any, base: Any) -> float:
    return float(change) / float(base) if float(base) else math.inf


jax.tree_util.register_pytree_node(
    EnergyKept,
    lambda kept: (({**kept}, kept.changes, kept.bases), tuple(kept.ranks.items())),
    lambda ranks, arrays: EnergyKept(arrays[0], dict(ranks), arrays[1], arrays[2]),
)


def extract(
    base: PyTree,
    tuned: PyTree,
    plan: Plan | LoraConfig,
    uses: Uses | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    niter: int | None = None,
    key: Array | None = None,
) -> tuple[dict[Path, LoraFactors | Array], EnergyKept]:
    """Adapters from a full fine-tune: the nearest low-rank update to each weight's change, and the energy it keeps.

    The factors are the truncated SVD of ``tuned - base`` (Eckart and Young 1936), taken in float32, one weight (one
    slice of a stacked weight) at a time, with the singular values shared evenly between A and B. A change of the rank
    or less is recovered up to rounding.

    >>> adapters, kept = jlora.extract(base, tuned, jlora.LoraConfig(rank=16, train_also=("norm", "bias")), uses)
    >>> print(kept)

    Args:
      base: the parameters before.
      tuned: the parameters after, a tree of the same paths and shapes.
      plan: from `plan`; or a config, planned first. Leaves of ``train_also`` are taken whole from ``tuned``. With
        ``use_dora``, the magnitudes are the norms of the extracted weight, so the update is the same.
      uses: with a config, from `trace`.
      rank: at most this, for every weight, in place of the plan's.
      energy: in place of a rank: the share of the squared norm of each change to keep; each weight gets the smallest
        rank for it, one for all slices of a stacked weight. Not under ``jit``, where ranks cannot depend on values.
      niter, key: for large weights: an SVD randomized with ``key``, with that many subspace iterations; see
        `decompose`. Not with energy.

    Returns:
      ``(adapters, kept)``: as from `init`, in the config's dtype, and `EnergyKept`. The scale is the config's for the
      rank.

    Raises:
      ValueError: listing every weight that changed and is not in the plan (not under ``jit``), every leaf that one tree
        lacks or has in another shape, and changes with NaN or infinity (not under ``jit``); as `plan`.
      TypeError: for energy under ``jit``; for params that are only shapes; for niter without key; as `init`.
    """
    check_options("extract", rank, energy, optional=True)
    if (niter is None) != (key is None):
        raise TypeError("extract: niter and key belong together")
    if niter is not None and energy is not None:
        raise TypeError("extract: got niter and energy, which needs all singular values; pass rank= with niter")
    key = None if key is None else one_key(key, "extract", "key")
    before, _, plan = planned("extract", base, plan, uses)
    after = named_leaves(tuned)[0]
    _check_same_paths(before, after)
    for leaves in (before, after):
        check_values("extract", leaves, list(plan), "compared")
    check_unchanged(before, after, plan)
    found, kept = {}, {}
    for path, target in plan.items():
        own = None if key is None else path_key(key, path)
        found[path], kept[path] = extracted(before[path], after[path], target, plan.config, rank, energy, niter, own)
    return found, energy_kept(found, kept)


def energy_kept(adapters: Mapping[Path, Any], norms: Mapping[Path, tuple[Array, Array, Array] | None]) -> EnergyKept:
    """The report, from the norms of what is kept, of the changes and of the bases."""
    seen = {path: triple for path, triple in norms.items() if triple is not None}
    shares = {
        path: jnp.where(change > 0, jnp.square(kept / jnp.where(change > 0, change, 1)), 1)
        for path, (kept, change, _) in seen.items()
    }
    return EnergyKept(
        shares,
        {path: adapters[path].rank for path in seen},
        {path: change for path, (_, change, _) in seen.items()},
        {path: base for path, (_, _, base) in seen.items()},
    )


def extracted(
    before: Any,
    after: Any,
    target: Target,
    config: LoraConfig,
    rank: int | None,
    energy: float | None,
    niter: int | None = None,
    key: Array | None = None,
) -> tuple[LoraFactors | Array, tuple[Array, Array, Array] | None]:
    """The adapter of one leaf, and the norms of the kept change, the change and the base (None if taken whole)."""
    if target.axes is None:
        return copy_of(after, config.dtype), None
    if energy is not None:
        rank = rank_for(_singular_values(before, after, target.axes), energy, "extract")
    _, inputs, outputs = (math.prod(sizes) for sizes in target.axes.sizes(target.shape))
    rank = min(rank or target.rank, inputs, outputs)
    scale = dataclasses.replace(config.for_path(target.path), rank=rank, init="kaiming").scale
    a, b, norms = _nearest(before, after, key, target.axes, rank, scale, niter)
    if not isinstance(norms[1], Tracer) and not np.isfinite(norms[1]):
        raise ValueError(f"extract: NaN or infinity in the change of {target.path!r}; expected finite weights")
    factors = to_factors(a, b, target, config.dtype, scale)
    if target.dora:
        factors = with_magnitude(factors, as_array(before), target.path, config.dtype)
    return factors, norms


def _changes(before: Any, after: Any, axes: Axes) -> tuple[Array, Array]:
    """The weight, and its change."""
    weight, leaf = (to_matrices(jnp.asarray(as_array(x)), axes) for x in (before, after))
    return weight, leaf - weight


@functools.partial(jax.jit, static_argnames="axes")
def _singular_values(before: Any, after: Any, axes: Axes) -> Array:
    """Those of every slice's change, ``[slices, k]``."""
    _, change = _changes(before, after, axes)
    return lax.map(lambda x: jnp.linalg.svd(x, compute_uv=False), change.reshape(-1, *change.shape[-2:]))


@functools.partial(jax.jit, static_argnames=("axes", "rank", "scale", "niter"))
def _nearest(
    before: Any, after: Any, key: Array | None, axes: Axes, rank: int, scale: float, niter: int | None
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Factors of the change as matrices, and the norms of what they keep, of the change and of the weight."""
    weight, change = _changes(before, after, axes)
    slices = change.reshape(-1, *change.shape[-2:])
    keys = None if key is None else jax.random.split(key, len(slices))

    def of_slice(x: Any) -> tuple[Array, Array, Array]:
        u, s, vh = truncated_svd(x[0], rank, niter, x[1])
        return *balanced(u, s, vh, scale), s

    a, b, s = lax.map(of_slice, (slices, keys))
    kept, size, base = (jnp.linalg.norm(x.ravel()) for x in (s, change, weight))
    batch = change.shape[:-2]
    return a.reshape(*batch, *a.shape[1:]), b.reshape(*batch, *b.shape[1:]), (kept, size, base)


def _check_same_paths(before: Mapping[Path, Any], after: Mapping[Path, Any]) -> None:
    wrong = [f"{path!r} is missing in tuned{nearest(path, after)}" for path in before if path not in after]
    wrong += [f"{path!r} is missing in base{nearest(path, before)}" for path in after if path not in before]
    wrong += [
        f"{path!r} has shape {np.shape(before[path])} in base and {np.shape(after[path])} in tuned"
        for path in before
        if path in after and np.shape(before[path]) != np.shape(after[path])
    ]
    if wrong:
        raise ValueError(
            f"extract: base and tuned are not parameters of one model:{bullets(wrong)}\nExpected two trees of the same "
            "paths and shapes."
        )


def check_unchanged(before: Mapping[Path, Any], after: Mapping[Path, Any], plan: Plan) -> None:
    """Raises a ValueError listing every leaf outside of the plan that changed. Does nothing while tracing."""
    changed = [path for path in before if path not in plan and differ(before[path], after[path])]
    refuse_changed(changed, "To leave their changes out, give both trees the same values there.")


def refuse_changed(changed: Sequence[Path], way_out: str) -> None:
    """Raises a ValueError listing the leaves that changed and are not in the plan, if there are any."""
    if changed:
        raise ValueError(
            f"extract: {len(changed)} leaves changed and are not in the plan:{bullets(map(repr, changed))}\nName them "
            f"in train_also of the config, to take them whole, or in targets, to give them factors. {way_out}"
        )


def differ(one: Any, other: Any) -> bool:
    """Whether two leaves hold different numbers; False while tracing, and for leaves that are not numbers."""
    one, other = as_array(one), as_array(other)
    if isinstance(one, Tracer) or isinstance(other, Tracer) or not hasattr(one, "dtype"):
        return False
    if jnp.issubdtype(one.dtype, jax.dtypes.extended):
        return False
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in (one, other)):
        return False
    return not np.array_equal(np.asarray(jax.device_get(one)), np.asarray(jax.device_get(other)))
