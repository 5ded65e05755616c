"""Factors from data: from moments of the inputs (CorDA, EVA), and from gradients (LoRA-GA)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._src.algebra.matrices import balanced, to_factors, to_matrices, truncated_svd
from jlora._src.config import LoraConfig
from jlora._src.inits.moments import InputMoments
from jlora._src.types import Array, LoraFactors, Path, Target

_DAMPING = 0.01
"""What CorDA adds to the diagonal of a second moment, as a share of its mean."""
_GAMMA = 16
"""LoRA-GA's γ: the larger, the smaller are both factors."""


def corda(weight: Array, target: Target, dtype: str, *, moments: InputMoments) -> LoraFactors:
    """The first components of the inputs' second moment times the weight (Yang et al. 2024, section 3)."""
    return _corda(weight, target, dtype, moments, slice(0, target.rank))


def corda_kpm(weight: Array, target: Target, dtype: str, *, moments: InputMoments) -> LoraFactors:
    """The last components: what the inputs use least, to preserve what the model knows of them."""
    return _corda(weight, target, dtype, moments, slice(-target.rank, None))


def _corda(weight: Array, target: Target, dtype: str, moments: InputMoments, part: slice) -> LoraFactors:
    assert target.axes is not None
    matrices = to_matrices(weight, target.axes)
    size = moments.square.shape[-1]
    mean = jnp.trace(moments.square, axis1=-2, axis2=-1)[..., None, None] / size
    # Divided by its mean, so that inputs of another scale share the singular values between A and B alike. Inputs that
    # are all zero say nothing.
    second = moments.square / jnp.where(mean > 0, mean, 1) + jnp.where(mean > 0, _DAMPING, 1) * jnp.eye(size)
    u, s, vh = jnp.linalg.svd(second @ matrices, full_matrices=False)
    a, b = balanced(u[..., part], s[..., part], vh[..., part, :], target.scale)
    return to_factors(jnp.linalg.solve(second, a), b, target, dtype)


def eva(weight: Array, target: Target, dtype: str, *, moments: InputMoments) -> LoraFactors:
    """The principal components of the inputs (Paischer et al. 2024); B = 0."""
    _, vectors = _components(moments)
    a = vectors[..., ::-1][..., : target.rank]
    return to_factors(a, jnp.zeros((*a.shape[:-2], target.rank, _outputs(target))), target, dtype)


def redistributed(
    targets: Mapping[Path, Target], config: LoraConfig, moments: Mapping[Path, InputMoments], rho: float
) -> dict[Path, Target]:
    """The targets with ranks by the share of the inputs' variance that each component explains; without those of rank
    0.

    The sum of the ranks over all slices of all weights stays, up to the last slices. The scale stays ``alpha / rank``
    of the plan's rank (with rsLoRA, alpha grows with the rank), as in PEFT.

    Raises:
      ValueError: if ``rho`` is below 1, listing every weight with fewer inputs than its largest rank, or if moments
        are traced: ranks need values.
    """
    if not rho >= 1:
        raise ValueError(f"decompose: got rho={rho}, expected at least 1")
    most = {path: round(target.rank * rho) for path, target in targets.items()}
    inputs = {path: moments[path].square.shape[-1] for path in targets}
    if wrong := [f"{path!r}: {n} inputs, {most[path]} components" for path, n in inputs.items() if most[path] > n]:
        raise ValueError(
            f"decompose: method='eva' with rho={rho}: too few inputs: {'; '.join(wrong)}. Lower rank or rho."
        )
    if rho == 1:
        return dict(targets)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(moments)):
        raise ValueError("decompose: method='eva' sets ranks by values: call it outside of jit, or pass rho=1")
    shares = {path: np.asarray(_shares(moments[path], most[path])) for path in targets}
    slices = {path: _slices(target) for path, target in targets.items()}
    budget = sum(target.rank * slices[path] for path, target in targets.items())
    ranks = dict.fromkeys(targets, 0)
    # Sorting is stable: equal shares go to the first weights of the plan.
    components = [(share, path) for path in targets for share in shares[path]]
    for _, path in sorted(components, key=lambda component: -component[0]):
        if slices[path] <= budget:
            ranks[path] += 1
            budget -= slices[path]
    return {path: _with_rank(target, ranks[path], config) for path, target in targets.items() if ranks[path]}


def _with_rank(target: Target, rank: int, config: LoraConfig) -> Target:
    rslora = config.for_path(target.path).use_rslora
    scale = target.scale * math.sqrt(rank / target.rank) if rslora else target.scale
    return dataclasses.replace(target, rank=rank, scale=scale)


def _components(moments: InputMoments) -> tuple[Array, Array]:
    """The variances along the principal components, ascending, and the components, in columns."""
    count = jnp.maximum(moments.count, 1)[..., None, None]
    scatter = moments.square - moments.total[..., :, None] * moments.total[..., None, :] / count
    return jnp.linalg.eigh(scatter)


def _shares(moments: InputMoments, most: int) -> Array:
    """The shares of variance that the first components explain, descending; over the slices, their mean."""
    values = jnp.maximum(_components(moments)[0], 0)
    total = jnp.maximum(values.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (values / total)[..., ::-1][..., :most].reshape(-1, most).mean(0)


def lora_ga(weight: Array, target: Target, dtype: str, *, gradients: Array) -> LoraFactors:
    """Singular vectors of the gradient, the first r for A and the next r for B, at the stable scale (Wang et al. 2024,
    theorem 3.1 and algorithm 1)."""
    assert target.axes is not None
    rank = target.rank
    u, _, vh = truncated_svd(to_matrices(gradients, target.axes), 2 * rank)
    size = _outputs(target) ** 0.25 / math.sqrt(_GAMMA)
    return to_factors(size * u[..., :rank], size * vh[..., rank:, :], target, dtype)


def _outputs(target: Target) -> int:
    assert target.axes is not None
    return math.prod(target.axes.sizes(target.shape)[2])


def _slices(target: Target) -> int:
    assert target.axes is not None
    return math.prod(target.axes.sizes(target.shape)[0])
